"""Who holds an output on an object store: an object that its holder renews, and that expires.

Ages are taken by the store's own clock, from what it says of two objects, so that the clocks of
machines do not matter. Where the store honours conditional writes (``If-None-Match``,
``If-Match``), only one of two runs can win; where it ignores them, each looks again after a while
whether it is still the one that wrote last.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from vlmbatch.errors import OutputLocked, RunStopped
from vlmbatch.results.store import LOCK_FILE

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""Without a renewal for so long, the holder is taken for dead."""
SETTLE_SECONDS = 2.0
"""Who wrote before us without having seen us has done so by then."""
FRESH = 0.6
"""For this share of its time a lease counts without a look; renewals come every third."""
LAST_TRY_SECONDS = 10.0


class StatLike(Protocol):
    """An object's tag, and when it was written by the store's clock."""

    @property
    def tag(self) -> str: ...

    @property
    def modified(self) -> datetime: ...


class LeaseStore(Protocol):
    """What a lease needs of a store. ``patience``: seconds to wait for a busy one."""

    place: str

    def read(self, name: str, *, patience: float | None = None) -> bytes | None: ...

    def stat(self, name: str, *, patience: float | None = None) -> StatLike | None: ...

    def create(self, name: str, data: bytes, *, patience: float | None = None) -> bool: ...

    def replace(
        self, name: str, data: bytes, tag: str, *, patience: float | None = None
    ) -> bool: ...

    def remove(self, name: str, *, patience: float | None = None) -> None: ...


class Lease:
    """Of this process on one output: taken, renewed in the background, given back."""

    def __init__(self, store: LeaseStore, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._token = secrets.token_hex(8)
        self._renewed = 0.0
        """When the last renewal began, by this process's clock."""
        self._lost: RunStopped | None = None
        self._renewing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def take(self) -> None:
        """Raises OutputLocked, naming the holder, where another run has it."""
        began = time.monotonic()
        held = self._store.stat(LOCK_FILE)
        if held is None:
            created = self._store.create(LOCK_FILE, self._note())
            # A store that takes what it should refuse looks at no conditions.
            sure = created and not self._store.create(LOCK_FILE, self._note())
        else:
            holder = _holder(self._store)
            age = self._age(held)
            if age <= _seconds_of(holder) and not _is_dead(holder):
                raise _locked(self._store.place, holder, age)
            log.warning("taking over from %s, which is gone", _name(holder))
            self._store.replace(LOCK_FILE, self._note(), held.tag)
            sure = False
        if not sure:
            time.sleep(SETTLE_SECONDS)
        holder = _holder(self._store)
        if holder.get("token") != self._token:
            raise _locked(self._store.place, holder, 0.0)
        self._renewed = began if sure else time.monotonic() - SETTLE_SECONDS
        self._thread.start()

    def raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def check(self) -> None:
        """Raises where the lease is lost; where it may be, for want of renewals, looks."""
        self.raise_if_lost()
        if time.monotonic() - self._renewed > FRESH * self._seconds:
            self.renew()

    def renew(self, *, patience: float | None = None) -> None:
        """Raises OutputLocked where another run has taken over."""
        with self._renewing:
            self.raise_if_lost()
            began = time.monotonic()
            found = self._store.stat(LOCK_FILE, patience=patience)  # its tag before its content
            holder = _holder(self._store, patience=patience)
            if found is None:  # somebody deleted it
                self._store.create(LOCK_FILE, self._note(), patience=patience)
            elif holder.get("token") == self._token:
                self._store.replace(LOCK_FILE, self._note(), found.tag, patience=patience)
            holder = _holder(self._store, patience=patience)
            if holder.get("token") != self._token:
                self._lost = OutputLocked(
                    f"another run has taken {self._store.place} over ({_name(holder)}): this one "
                    f"could not renew its lease for {began - self._renewed:.0f} s",
                    hint="the other one goes on from what this one committed",
                )
                raise self._lost
            self._renewed = began

    def _keep(self) -> None:
        wait = self._seconds / 3
        while not self._over.wait(wait):
            try:
                self.renew(patience=0.0)
                wait = self._seconds / 3
            except OutputLocked:
                return
            except RunStopped as error:
                log.warning("the lease is not renewed: %s", error.message)
                wait = self._seconds / 10

    def give_back(self) -> None:
        """Others may have the output at once; where the store is away, when the lease expires."""
        self._over.set()
        self._thread.join()
        with suppress(RunStopped):
            if self._lost is None and self._holds(patience=LAST_TRY_SECONDS):
                self._store.remove(LOCK_FILE, patience=LAST_TRY_SECONDS)

    def _holds(self, *, patience: float) -> bool:
        return _holder(self._store, patience=patience).get("token") == self._token

    def _note(self) -> bytes:
        note = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "token": self._token,
            "seconds": self._seconds,
            "renewed": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return json.dumps(note, indent=1).encode()

    def _age(self, held: StatLike) -> float:
        """Seconds since the lock was written, by the clock of the store."""
        probe = f"{LOCK_FILE}-{self._token}"
        self._store.create(probe, b"")
        try:
            now = self._store.stat(probe)
        finally:
            self._store.remove(probe)
        return (now.modified - held.modified).total_seconds() if now is not None else 0.0


def is_running(store: LeaseStore) -> bool:
    """For a look only, which writes nothing: by the clock of this machine."""
    held = store.stat(LOCK_FILE)
    if held is None:
        return False
    holder = _holder(store)
    age = (datetime.now(UTC) - held.modified).total_seconds()
    return age <= _seconds_of(holder) and not _is_dead(holder)


def _holder(store: LeaseStore, *, patience: float | None = None) -> dict[str, Any]:
    """What the lock says; empty where there is none, or nobody can read it."""
    with suppress(ValueError):
        value = json.loads(store.read(LOCK_FILE, patience=patience) or b"{}")
        if isinstance(value, dict):
            return value
    return {}


def _seconds_of(holder: dict[str, Any]) -> float:
    seconds = holder.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else LEASE_SECONDS


def _name(holder: dict[str, Any]) -> str:
    return f"pid {holder.get('pid', '?')} on {holder.get('host', 'another machine')}"


def _locked(place: str, holder: dict[str, Any], age: float) -> OutputLocked:
    left = max(1.0, _seconds_of(holder) - age + 1)
    return OutputLocked(
        f"another run holds {place} ({_name(holder)}, renewed {max(0.0, age):.0f} s ago)",
        hint="wait for it, stop it, or give another -o; if it was killed, its lease ends in "
        f"{left:.0f} s, and then the same command goes on",
    )


def _process(pid: int) -> str | None:
    """Tells a process of this machine from all others, ever; None where there is none, or this
    system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        is_over = stat[0] in "ZX"  # and only waits for its parent to ask how it ended
        return None if is_over else f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {stat[19]}"
    except (OSError, IndexError):
        return None


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether it ran on this machine, and does no more: nobody has to wait for its lease."""
    was = holder.get("process")
    mine = _process(os.getpid())
    if not isinstance(was, str) or mine is None or was.split()[:2] != mine.split()[:2]:
        return False
    return was != _process(int(was.split()[2]))
