"""Environments of their own, for models whose code needs other versions than we have. No Ray here.

An environment is a virtual environment laid over the installation that runs vlmbatch: torch, Ray,
vlmbatch and all the rest are that installation's, and only what differs is installed on top. It is
built once per machine, in the user's cache, by pip as it is configured, and stays there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash

import vlmbatch
from vlmbatch.errors import RunStopped, UsageError

CACHE = "VLMBATCH_CACHE"
"""Names the folder of what is built once per machine."""

_CHECK = "import ray, vlmbatch.worker"
_UNREACHABLE = re.compile(
    "Failed to establish a new connection|NameResolutionError|Max retries exceeded|"
    "ConnectTimeout|ProxyError|Network is unreachable"
)


@dataclass(frozen=True, slots=True)
class Built:
    """An environment that is there, and what it cost."""

    python: str
    """The path of its interpreter."""
    host: str
    seconds: float
    size: int
    """Bytes, without the installation beneath."""

    def __str__(self) -> str:
        return f"built in {self.seconds:.0f} s, {self.size / 1e6:.0f} MB"


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment with these requirements (as pip takes them), on this machine.

    ``cache``: the folder of all of them, else what VLMBATCH_CACHE says, else the user's cache.
    """

    requirements: tuple[str, ...]
    cache: str | None = None

    def __str__(self) -> str:
        return ", ".join(self.requirements)

    @property
    def folder(self) -> Path:
        cache = Path(self.cache) if self.cache else cache_folder()
        return cache.absolute() / "environments" / key_of(facts_of(self.requirements))

    @property
    def log(self) -> Path:
        """What pip said."""
        return self.folder.with_suffix(".log")

    def built(self) -> Built | None:
        """None where it is not there, or not since the installation beneath has changed."""
        stamp = self._stamp()
        if stamp is None or stamp["beneath"] != _beneath():
            return None
        return Built(str(self.python), socket.gethostname(), stamp["seconds"], stamp["size"])

    def ensure(self, say: Callable[[str], None]) -> Built:
        """Build it, unless it is there. Of several processes at once one builds, the others wait.

        Raises RunStopped or UsageError where it cannot be built.
        """
        if (there := self.built()) is not None:
            return there
        log, lock = self.log, self.folder.with_suffix(".lock")
        waiting = f"another process builds the environment with {self}: waiting (log: {log})"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with _locked(lock, lambda: say(waiting)) as held:
                if (there := self.built()) is not None:
                    return there
                say(f"building an environment with {self}, once per machine (log: {log})")
                built = self._build(held)
        except OSError as error:
            raise RunStopped(
                f"cannot build an environment in {log.parent}: {error.strerror or error}",
                hint=f"{CACHE} names another folder",
            ) from None
        say(f"{built}, in {self.folder}")
        return built

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def _complete(self) -> Path:
        """Written last: a folder without it was left half-built."""
        return self.folder / "complete.json"

    def _stamp(self) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            stamp: dict[str, Any] = json.loads(self._complete.read_bytes())
            return stamp
        return None

    def _build(self, lock: int) -> Built:
        """Where only what is beneath has changed, pip looks again, and mostly finds nothing to do:
        that needs no network."""
        if find_spec("pip") is None:
            raise UsageError(
                f"pip is not installed beside vlmbatch, and the environment with {self} needs it",
                hint=f"{sys.executable} -m ensurepip, or uv pip install pip",
            )
        began = time.monotonic()
        if self._stamp() is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            venv.EnvBuilder(symlinks=True, with_pip=False).create(self.folder)
        self._complete.unlink(missing_ok=True)
        _lay_over(self.folder, parent_sites())
        kept = self.folder / "constraints.txt"
        kept.write_text("".join(f"{line}\n" for line in _constraints()))
        self.log.write_bytes(b"")
        pip = ["-m", "pip", "install", "--no-input", "--no-user", "--progress-bar=off"]
        self._run([*pip, "-c", str(kept), "--", *self.requirements], lock)
        self._run(["-c", _CHECK], lock)
        seconds, size = round(time.monotonic() - began, 1), _size(self.folder)
        stamp = {"requirements": self.requirements, "beneath": _beneath()}
        whole = self._complete.with_suffix(".tmp")
        whole.write_text(json.dumps(stamp | {"seconds": seconds, "size": size}, indent=1))
        whole.replace(self._complete)
        return Built(str(self.python), socket.gethostname(), seconds, size)

    def _run(self, words: list[str], lock: int) -> None:
        """Its Python does this, in its own folder. The lock is held until that has ended too: what
        outlives a killed build must not write into the next one."""
        with open(self.log, "ab") as log:
            before = log.tell()
            ended = subprocess.run(
                [self.python, *words],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                check=False,
            )
        if ended.returncode == 0:
            return
        said = self.log.read_bytes()[before:].decode(errors="replace")
        hint = f"the whole log is {self.log}"
        if _UNREACHABLE.search(said):
            hint = (
                "pip reaches no package index from here: PIP_INDEX_URL or PIP_FIND_LINKS name one "
                f"that it does. {hint}"
            )
        raise RunStopped(f"no environment with {self} can be built: {_reason(said)}", hint=hint)


def cache_folder() -> Path:
    """$VLMBATCH_CACHE, else ``vlmbatch`` in $XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get(CACHE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlmbatch"


def facts_of(requirements: tuple[str, ...]) -> dict[str, str]:
    """What makes an environment another one."""
    return {
        "requirements": "\n".join(requirements),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "ray": metadata.version("ray"),
        "vlmbatch": f"{vlmbatch.__version__} {Path(vlmbatch.__file__).parent}",
        "beneath": sys.prefix,
    }


def key_of(facts: Mapping[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(sorted(facts.items())).encode())[:16]


def parent_sites() -> list[str]:
    """The folders of installed packages of the Python that runs this, in the order of import."""
    own = {*site.getsitepackages()}
    if site.ENABLE_USER_SITE:
        own.add(site.getusersitepackages())
    return [folder for folder in sys.path if folder in own]


def _lay_over(folder: Path, sites: list[str]) -> None:
    """The environment's packages first, even before those of PYTHONPATH, then what these folders
    have, also what is installed in them as editable."""
    paths = {"base": str(folder), "platbase": str(folder)}
    own = sysconfig.get_path("purelib", "venv", paths)
    lines = [
        f"import sys; sys.path.insert(0, {own!a})",
        *(f"import site; site.addsitedir({beneath!a})" for beneath in sites),
    ]
    Path(own, "beneath.pth").write_text("".join(f"{line}\n" for line in lines), encoding="ascii")


def _constraints() -> list[str]:
    """What must hold in it as well: our own requirements, and Ray's exact version, for a worker
    joins the cluster of its driver."""
    own = []
    with contextlib.suppress(metadata.PackageNotFoundError):
        own = [line for line in metadata.requires("vlmbatch") or () if "extra ==" not in line]
    ours = [line for line in own if re.match(r"ray\b", line) is None]
    return [*ours, f"ray=={metadata.version('ray')}"]


def _beneath() -> str:
    """The versions of all that is installed under an environment, as one text to compare."""
    names = sorted(path.name for own in parent_sites() for path in Path(own).glob("*.dist-info"))
    return xxhash.xxh3_128_hexdigest("\n".join(names).encode())


def _size(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


@contextlib.contextmanager
def _locked(path: Path, waits: Callable[[], None]) -> Iterator[int]:
    """Holds the lock until this process and those that were given it have ended."""
    with open(path, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _reason(said: str) -> str:
    """The last error of a log, else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match("error: (?!ResolutionImp)", line, re.IGNORECASE)]
    return next(iter([*errors[-1:], *lines[-1:]]), "it said nothing")[:300]
