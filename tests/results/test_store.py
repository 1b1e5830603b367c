"""A file appears whole or not at all; what cannot be written is named; one run holds an output."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from vlmbatch.errors import OutputLocked, RunStopped
from vlmbatch.results.store import LocalStore


@pytest.fixture
def store(tmp_path):
    store = LocalStore(tmp_path / "out")
    store.make()
    return store


def write_bytes(data: bytes):
    return lambda path: path.write_bytes(data)


def test_what_is_written_is_there_and_nothing_else(store):
    store.write("a", write_bytes(b"one"))
    store.write("a", write_bytes(b"two"))
    assert (store.folder / "a").read_bytes() == b"two"
    assert list(store.tmp.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_traces(store):
    store.write("a", write_bytes(b"old"))

    def fails(path):
        path.write_bytes(b"half")
        raise KeyError("while building")

    with pytest.raises(KeyError):
        store.write("a", fails)
    assert (store.folder / "a").read_bytes() == b"old"
    assert list(store.tmp.iterdir()) == []


def test_json_goes_in_and_comes_out(store):
    value = {"a": [1, None, "ü"], "b": {}}
    store.write_json("__vlmbatch/x.json", value)
    assert store.read_json("__vlmbatch/x.json") == value
    assert store.read_json("__vlmbatch/none.json") is None
    assert store.read_json("__vlmbatch/x.json/y.json") is None


def test_a_broken_json_file_is_named(store):
    (store.ours / "run.json").write_text('{"run": ')
    with pytest.raises(RunStopped, match=r"cannot read .*run\.json"):
        store.read_json("__vlmbatch/run.json")


def test_deleting_is_idempotent_and_tmp_is_cleaned(store):
    (store.tmp / "part-00000.parquet.1234").write_bytes(b"half")
    store.clean_tmp()
    assert list(store.tmp.iterdir()) == []
    store.delete(["never there"])
    LocalStore(store.folder / "not made").clean_tmp()


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_in_the_way_is_named(tmp_path, inside):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RunStopped, match=r"cannot write .*out") as caught:
        LocalStore(tmp_path / "out" / inside).make()
    assert "-o" in caught.value.hint


MOUNTED = """
    import sys
    from pathlib import Path
    from vlmbatch.errors import RunStopped
    from vlmbatch.results.store import LocalStore

    store = LocalStore(sys.argv[1])
    try:
        store.make()
        store.write("part-00000.parquet", lambda p: p.write_bytes(b"x" * 2**21))
    except RunStopped as error:
        print(error)
        print(sorted(p.name for p in store.folder.rglob("*") if p.is_file()))
"""


def on_a_mount(folder, options: str) -> list[str]:
    """What MOUNTED says when the folder is a small tmpfs."""
    folder.mkdir()
    code = f"mount -t tmpfs -o size=1m,{options} none {folder} && exec {sys.executable} - {folder}"
    run = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", code],
        input=textwrap.dedent(MOUNTED),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    if "unshare:" in run.stderr or "mount:" in run.stderr:
        pytest.skip(f"no private mounts here: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_a_full_disk_stops_the_run_and_leaves_no_half_file(tmp_path):
    message, hint, files = on_a_mount(tmp_path / "full", "rw")
    path = tmp_path / "full" / "part-00000.parquet"
    assert message == f"cannot write {path}: No space left on device"
    assert hint == "  -> free some space and run the same command again"
    assert files == "[]"


def test_a_read_only_place_is_named(tmp_path):
    message, hint, files = on_a_mount(tmp_path / "fixed", "ro")
    assert message == f"cannot write {tmp_path / 'fixed'}: Read-only file system"
    assert hint == "  -> give an output folder that can be written with -o"
    assert files == "[]"


HOLDER = """
    import sys
    from vlmbatch.results.store import LocalStore

    with LocalStore(sys.argv[1]).lock():
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def holder(store):
    """Another process that holds the output."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(store.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_holder_is_refused_with_the_name_of_the_first(store, holder):
    with pytest.raises(OutputLocked, match=rf"pid {holder.pid} on ") as caught, store.lock():
        pass
    assert str(store.folder) in caught.value.message
    assert caught.value.exit_code == 1
    assert store.is_locked()


def test_a_killed_holder_holds_nothing(store, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not store.is_locked()
    with store.lock():
        assert f"pid {os.getpid()}" in (store.ours / "lock").read_text()


def test_the_lock_is_free_again_after_an_error(store):
    with contextlib.suppress(KeyError), store.lock():
        assert store.is_locked()
        raise KeyError
    assert not store.is_locked()


def test_a_shorter_name_of_the_holder_replaces_a_longer_one(store):
    (store.ours / "lock").write_text("pid 123456789012 on a-host-with-a-very-long-name.example.org")
    with store.lock():
        assert "very-long-name" not in (store.ours / "lock").read_text()


def test_an_output_that_is_not_there_is_not_locked(tmp_path):
    assert not LocalStore(tmp_path / "none").is_locked()


def test_written_json_is_readable_by_others(store):
    store.write_json("__vlmbatch/status.json", {"a": "ü"})
    assert json.loads((store.ours / "status.json").read_bytes()) == {"a": "ü"}
    assert (store.ours / "status.json").stat().st_mode & 0o444 == 0o444
