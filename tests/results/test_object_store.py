"""An output on an object store: whole files, one holder, and errors that say what to do."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import until
from tests.s3_faults import (
    EXPIRED,
    INTERNAL,
    SLOW_DOWN,
    Error,
    FaultProxy,
    LostAnswer,
    first,
    where,
)
from tests.strategies import result
from vlmbatch.errors import OutputLocked, OutputNotOurs, RunStopped, UsageError
from vlmbatch.records import Range
from vlmbatch.results import lease
from vlmbatch.results.files import list_parts, list_shards, write_part, write_shard
from vlmbatch.results.object_store import BLOCKS, BlocksFile, ObjectStore
from vlmbatch.results.output import Output, check_ours
from vlmbatch.results.schema import RESULT_SCHEMA, to_batch
from vlmbatch.results.store import LOCK_FILE, LocalStore, open_store


@pytest.fixture
def bucket(s3_server):
    with s3_server.in_environment():
        yield s3_server.new_bucket()


def emulated(name: str):
    """A parameter: a store that an emulator stands for (tests/clouds.py)."""
    marks = [pytest.mark.consumers, pytest.mark.filterwarnings("default")]  # their libraries' own
    return pytest.param(name, marks=marks)


@pytest.fixture(params=["s3", emulated("google"), emulated("azure")])
def root(request):
    """The address of a new bucket."""
    server = request.getfixturevalue(f"{request.param}_server")
    with server.in_environment():
        yield f"{server.scheme}://{server.new_bucket()}"


@pytest.fixture
def store(root):
    return ObjectStore(f"{root}/some/run")


def write_bytes(data: bytes):
    return lambda path: path.write_bytes(data)


def batch_of(rows: range, said: str = "yes"):
    results = [result(row, 0, 0, said, None) for row in rows]
    return to_batch(results, model="demo", schema=RESULT_SCHEMA)


# files


def test_a_file_is_there_whole_or_not_at_all(store):
    store.write("a", write_bytes(b"old"))

    def fails(path):
        path.write_bytes(b"half")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        store.write("a", fails)
    assert store.read("a") == b"old"
    assert store.read("b") is None
    store.write("a", write_bytes(b"new"))
    assert store.read("a") == b"new"
    assert list((store.logs.parent / "tmp").iterdir()) == []


def test_listings_name_what_lies_right_in_a_folder(store):
    assert store.entries() == []
    for name in ("part-1", "__vlmbatch/run.json", "__vlmbatch/shards/x"):
        store.write(name, write_bytes(b"1"))
    assert [entry.name for entry in store.entries()] == ["__vlmbatch", "part-1"]
    assert [entry.name for entry in store.entries("__vlmbatch/shards")] == ["x"]
    before = store.entries("__vlmbatch/shards")
    store.write("__vlmbatch/shards/x", write_bytes(b"2"))
    assert store.entries("__vlmbatch/shards") != before, "another content has another tag"
    store.delete(["part-1", "never there"])
    assert [entry.name for entry in store.entries()] == ["__vlmbatch"]


def test_a_file_replaces_only_the_one_that_was_seen(store):
    store.write("a", write_bytes(b"1"), replaces="")
    (seen,) = store.entries()
    store.write("a", write_bytes(b"2"), replaces=seen.tag)
    for before in (seen.tag, ""):
        with pytest.raises(RunStopped, match=rf"another run wrote {store.place}/a meanwhile"):
            store.write("a", write_bytes(b"3"), replaces=before)
    assert store.read("a") == b"2"
    (seen,) = store.entries()
    store.delete(["a"])
    with pytest.raises(RunStopped, match="another run deleted"):
        store.write("a", write_bytes(b"3"), replaces=seen.tag)
    store.write("a", write_bytes(b"4"))
    assert store.read("a") == b"4"


def test_an_empty_folder_costs_one_request(s3_server, bucket):
    with FaultProxy(s3_server) as proxy, proxy.in_environment():
        assert ObjectStore(f"s3://{bucket}/new").entries() == []
    (only,) = proxy.log
    assert only.request.query["prefix"] == "new/"


def test_shards_and_parts_are_as_in_a_folder(store, tmp_path):
    local = LocalStore(tmp_path)
    local.make()
    outputs = [Output(each, "beef", 10, RESULT_SCHEMA) for each in (store, local)]
    for output in outputs:
        write_shard(output.store, batch_of(range(5)), run="beef", epoch=1, rows=Range(0, 5))
        write_shard(output.store, batch_of(range(5, 10)), run="beef", epoch=1, rows=Range(5, 10))
        write_shard(output.store, batch_of(range(3)), run="dead", epoch=9, rows=Range(0, 3))
        output.gather(0)
        write_shard(output.store, batch_of(range(10, 12)), run="beef", epoch=2, rows=Range(10, 12))
        again = batch_of(range(2, 3), "again")
        write_shard(output.store, again, run="beef", epoch=2, rows=Range(2, 3), patch=True)
    one, two = (
        (
            pa.Table.from_batches(output.results()),
            output.counts(),
            list_parts(output.store),
            list_shards(output.store),
            output.view().committed,
        )
        for output in outputs
    )
    assert list(map(str, one)) == list(map(str, two))
    assert one[0].equals(two[0])
    outputs[0].delete_strays()
    assert {file.run for file in list_shards(store)} == {"beef"}


def test_a_footer_is_read_once(s3_server, bucket):
    with FaultProxy(s3_server) as proxy, proxy.in_environment():
        store = ObjectStore(f"s3://{bucket}/run")
        output = Output(store, "beef", 10, RESULT_SCHEMA)
        for number in range(3):
            rows = Range(10 * number, 10 * number + 10)
            batches = iter([batch_of(range(rows.first, rows.stop))])
            kwargs = {"schema": RESULT_SCHEMA, "run": "beef", "epoch": 1, "rows": rows}
            write_part(store, number, batches, **kwargs)
        assert output.counts().rows == 30
        before = proxy.operations
        assert output.counts().rows == 30
        assert proxy.operations - before == {"LIST": 2}


@given(st.data(), st.integers(0, 200), st.integers(1, 40))
def test_reading_by_ranges_gives_the_bytes_of_the_file(data, size, block):
    content = bytes(i % 251 for i in range(size))
    fetched = []

    def fetch(start: int, stop: int) -> bytes:
        fetched.append((start, stop))
        return content[start:stop]

    file = BlocksFile(fetch, size, block)
    for _ in range(data.draw(st.integers(1, 8))):
        at, count = data.draw(st.integers(0, size + 5)), data.draw(st.integers(-1, size + 5))
        file.seek(at)
        wanted = content[at:] if count < 0 else content[at : at + count]
        assert file.read(count) == wanted
        assert len(file._blocks) <= BLOCKS
    assert all(0 < stop - start <= block for start, stop in fetched)


# troubles


@pytest.mark.parametrize("fault", [SLOW_DOWN, LostAnswer(), Error(503, "Whatever")])
def test_what_goes_by_is_waited_for(s3_server, bucket, fault):
    with FaultProxy(s3_server) as proxy, proxy.in_environment():
        store = ObjectStore(f"s3://{bucket}/run")
        proxy.rule = where(first(fault), operation="PUT")
        store.write("a", write_bytes(b"content"))
        proxy.rule = where(first(fault), operation="GET")
        assert store.read("a") == b"content"
        proxy.rule = where(first(fault), operation="DELETE")
        store.delete(["a"])
        assert store.read("a") is None
    assert proxy.injected[fault] == 3


def test_a_store_is_waited_for_longer_than_its_library_does(s3_server, bucket):
    with FaultProxy(s3_server, where(first(*[INTERNAL] * 7), operation="PUT")) as proxy:
        with proxy.in_environment():
            store = ObjectStore(f"s3://{bucket}/run")
            store.write("a", write_bytes(b"content"))
            proxy.rule = where(first(*[INTERNAL] * 7), operation="PUT")
            with pytest.raises(OSError, match="injected"):
                proxy.fs().pipe_file(f"{bucket}/b", b"")
            assert store.read("a") == b"content"


def test_a_store_that_stays_away_stops_the_run(s3_server, bucket):
    with FaultProxy(s3_server, lambda _: INTERNAL) as proxy, proxy.in_environment():
        store = ObjectStore(f"s3://{bucket}/run", patience=0.0)
        with pytest.raises(
            RunStopped, match=rf"cannot write s3://{bucket}/run/a: the store does not"
        ):
            store.write("a", write_bytes(b"content"))


def test_refused_credentials_are_named_with_the_place(s3_server, bucket):
    with FaultProxy(s3_server, lambda _: EXPIRED) as proxy, proxy.in_environment():
        with pytest.raises(RunStopped) as caught:
            check_ours(ObjectStore(f"s3://{bucket}/run"))
    assert caught.value.exit_code == 1
    assert f"credentials for s3://{bucket} are missing, wrong or expired" in caught.value.message
    assert "the same command again" in caught.value.hint


def test_a_store_that_forbids_is_named(s3_server, bucket):
    denied = Error(403, "AccessDenied")
    with FaultProxy(s3_server, where(lambda _: denied, operation="PUT")) as proxy:
        with (
            proxy.in_environment(),
            pytest.raises(RunStopped, match="does not let us in") as caught,
        ):
            ObjectStore(f"s3://{bucket}/run").write("a", write_bytes(b""))
    assert f"under s3://{bucket}/run/" in caught.value.hint


def test_a_missing_bucket_is_a_mistake_in_the_command(s3_server, bucket):
    with pytest.raises(UsageError, match="there is no bucket s3://nobody-has-this"):
        check_ours(ObjectStore("s3://nobody-has-this/run"))


@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("s3://key:secret@bucket/run", "credentials and settings do not belong"),
        ("s3://bucket/run?versionId=1", "credentials and settings do not belong"),
        ("https://host/run", "cannot be written"),
        ("hf://datasets/a/b", "cannot be written"),
        ("zip://x::s3://bucket/a.zip", "cannot be written"),
        ("nosuch://bucket/run", "nothing here reads nosuch"),
        ("s3://", "names no bucket"),
    ],
)
def test_what_is_no_place_for_an_output_is_refused(uri, what):
    with pytest.raises(UsageError, match=what) as caught:
        open_store(uri)
    assert "secret" not in str(caught.value)


def test_other_content_is_left_alone(store):
    check_ours(store)
    store.write("thesis.docx", write_bytes(b"years of work"))
    with pytest.raises(OutputNotOurs, match=r"holds something else \(thesis\.docx\)"):
        check_ours(store)
    with pytest.raises(OutputNotOurs, match="is an object, not a prefix"):
        check_ours(ObjectStore(f"{store.place}/thesis.docx"))
    store.write("__vlmbatch/run.json", write_bytes(b"{}"))
    check_ours(store)


def test_a_file_url_is_a_folder(tmp_path):
    assert open_store(f"file://{tmp_path}").place == str(tmp_path)


# the lease

HOLDER = """
    import sys, time
    from vlmbatch.results import lease
    from vlmbatch.results.object_store import ObjectStore

    if sys.argv[2] == "elsewhere":  # as on a system that does not tell processes apart
        lease._process = lambda pid: None
    with ObjectStore(sys.argv[1]).lock(seconds=float(sys.argv[3])):
        print("held", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def held(store):
    """Starts a process that holds the output."""
    processes = []

    def start(where: str, seconds: float) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", textwrap.dedent(HOLDER), store.place, where, str(seconds)]
        paths = os.pathsep.join(p for p in sys.path if p)
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def is_free(store) -> bool:
    try:
        with store.lock():
            return True
    except OutputLocked:
        return False


def test_a_second_run_is_refused_by_the_name_of_the_first(store, held):
    holder = held("here", 60)
    with pytest.raises(OutputLocked) as caught, store.lock():
        pytest.fail("both hold it")
    assert f"another run holds {store.place} (pid {holder.pid} on " in caught.value.message
    assert "renewed" in caught.value.message
    assert "its lease ends in" in caught.value.hint
    assert store.is_locked()


def test_nobody_waits_for_a_holder_that_died_on_this_machine(store, held):
    holder = held("here", 600)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not store.is_locked()
    with store.lock():
        assert store.is_locked()
    assert not store.is_locked()
    assert store.read(LOCK_FILE) is None


def test_the_lease_of_a_holder_that_died_elsewhere_ends(store, held):
    holder = held("elsewhere", 600)
    assert not is_free(store)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert store.is_locked()
    assert not is_free(store)
    note = json.loads(store.read(LOCK_FILE))
    store.put_unheld(LOCK_FILE, json.dumps({**note, "seconds": 1}).encode())  # no ten minutes
    until(lambda: is_free(store), "the lease has ended")


def test_a_holder_that_lives_keeps_its_lease_by_renewing_it(store, held):
    held("elsewhere", 6)
    first_note = json.loads(store.read(LOCK_FILE))
    tag = store.stat(LOCK_FILE).tag
    tags = {tag}

    def renewed() -> bool:
        tags.add(store.stat(LOCK_FILE).tag)
        return len(tags) > 2

    until(renewed, "two renewals")
    assert json.loads(store.read(LOCK_FILE))["token"] == first_note["token"]
    assert not is_free(store)


class IgnoresConditions(ObjectStore):
    """As stores do that know no ``If-None-Match`` and no ``If-Match``."""

    def create(self, name, data, *, patience=None):
        self.put_unheld(name, data)
        return True

    def replace(self, name, data, tag, *, patience=None):
        self.put_unheld(name, data)
        return True


@pytest.mark.parametrize("kind", [ObjectStore, IgnoresConditions])
@pytest.mark.parametrize("before", ["nothing", "a dead holder"])
def test_of_two_that_take_at_the_same_time_one_wins(root, kind, before):
    stores = [kind(f"{root}/{kind.__name__}/{before[0]}") for _ in range(3)]
    if before != "nothing":
        stores[0].put_unheld(LOCK_FILE, b'{"seconds": -1, "token": "dead"}')
    leases = [lease.Lease(store, 60.0) for store in stores]
    start, won, lost = threading.Barrier(len(stores)), [], []

    def take(each):
        start.wait()
        try:
            each.take()
            won.append(each)
        except OutputLocked:
            lost.append(each)

    threads = [threading.Thread(target=take, args=(each,)) for each in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 2)
    won[0].renew()
    won[0].give_back()
    assert stores[0].read(LOCK_FILE) is None


def test_who_has_lost_its_lease_changes_nothing_more(store):
    other = ObjectStore(store.place)
    store.write("__vlmbatch/run.json", write_bytes(b"1"))
    with store.lock(seconds=1.5):
        other.put_unheld(LOCK_FILE, b'{"token": "other", "host": "far", "pid": 7}')

        def lost() -> bool:
            try:
                store.check_held()
            except OutputLocked:
                return True
            return False

        until(lost, "it sees that")
        with pytest.raises(OutputLocked, match=r"has taken .* over \(pid 7 on far\)"):
            store.write("__vlmbatch/run.json", write_bytes(b"2"))
        with pytest.raises(OutputLocked):
            store.delete(["__vlmbatch/run.json"])
    assert store.read("__vlmbatch/run.json") == b"1"
    assert json.loads(store.read(LOCK_FILE))["token"] == "other"


def test_a_lost_acknowledgement_of_the_lock_is_no_other_holder(s3_server, bucket):
    rule = where(first(*[LostAnswer()] * 7), operation="PUT", key="__vlmbatch/lock")
    with FaultProxy(s3_server, rule) as proxy, proxy.in_environment():
        store = ObjectStore(f"s3://{bucket}/run")
        with store.lock():
            assert store.is_locked()
            proxy.rule = where(first(*[LostAnswer()] * 7), operation="PUT", key="__vlmbatch/lock")
            store._lease.renew()
            store.check_held()
    assert proxy.injected[LostAnswer()] == 14


def test_parts_are_read_by_others(store):
    write_part(
        store,
        0,
        iter([batch_of(range(7))]),
        schema=RESULT_SCHEMA,
        run="beef",
        epoch=1,
        rows=Range(0, 7),
    )
    store.write("__vlmbatch/run.json", write_bytes(b"{}"))
    table = pq.read_table(f"{store._root}/part-00000.parquet", filesystem=store._fs)
    assert table["row"].to_pylist() == list(range(7))


def gathered(store: ObjectStore, rows: Range, said: str, *, epoch: int = 1) -> Output:
    """An output with a shard of these rows, which is not gathered yet."""
    output = Output(store, "beef", part_rows=100, schema=RESULT_SCHEMA)
    batch = batch_of(range(rows.first, rows.stop), said)
    write_shard(store, batch, run="beef", epoch=epoch, rows=rows)
    return output


@pytest.mark.parametrize("there_before", [False, True])
def test_a_part_that_another_run_wrote_meanwhile_is_not_replaced(store, there_before):
    """As by a holder that slept until its lease had expired, in the middle of its upload."""
    if there_before:
        gathered(store, Range(0, 3), "first").gather(0)
    rows = Range(3, 6) if there_before else Range(0, 3)
    late = gathered(store, rows, "late")
    seen = late.view()
    next_one = gathered(ObjectStore(store.place), Range(0, 9), "next", epoch=2)
    next_one.gather(0)
    before = store.read("part-00000.parquet")
    gathered(store, rows, "late")  # which it had read by then
    with pytest.raises(RunStopped, match=r"another run wrote .*/part-00000\.parquet meanwhile"):
        late.gather(0, seen)
    assert store.read("part-00000.parquet") == before
    (part,) = list_parts(store)
    assert (part.epoch, part.rows) == (2, Range(0, 9))
    assert late.gather(0) is None  # with a new look, what came too late is only deleted
    assert list_shards(store) == []


def test_a_file_to_replace_that_is_gone_is_no_missing_bucket(s3_server, bucket):
    """AWS answers If-Match with 404 then: docs.aws.amazon.com, "PutObject", If-Match."""
    with FaultProxy(s3_server) as proxy, proxy.in_environment():
        store = ObjectStore(f"s3://{bucket}/run")
        store.write("a", write_bytes(b"1"))
        (entry,) = store.entries()
        store.delete(["a"])
        proxy.rule = where(first(Error(404, "NoSuchKey")), operation="PUT")
        with pytest.raises(RunStopped, match=rf"another run deleted s3://{bucket}/run/a meanwhile"):
            store.write("a", write_bytes(b"2"), replaces=entry.tag)


def test_a_part_whose_acknowledgement_was_lost_is_our_own(s3_server, bucket):
    with FaultProxy(s3_server) as proxy, proxy.in_environment():
        store = ObjectStore(f"s3://{bucket}/run")
        for first_row in (0, 3):  # created, then replaced
            output = gathered(store, Range(first_row, first_row + 3), "yes")
            lost = first(*[LostAnswer()] * 7)
            proxy.rule = where(lost, operation="PUT", key="part-00000")
            output.gather(0)
            (part,) = list_parts(store)
            assert part.rows == Range(0, first_row + 3)
    assert proxy.injected[LostAnswer()] == 14
