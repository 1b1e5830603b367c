"""Delta tables and Lance datasets: the rows of one version, as their own libraries read them."""

import base64
import json
import shutil
import struct
import subprocess
import sys
import textwrap
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.harness import echo, picture, read_results, run_json, vlmbatch
from tests.manifest.formats import stream
from tests.strategies import ranges
from vlmbatch.errors import ManifestError, ManifestUnreachable, UsageError, VlmbatchError
from vlmbatch.manifest import Manifest, open_manifest
from vlmbatch.records import Range

LINUX = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc on this system")


def rows(first: int, stop: int, **more) -> pa.Table:
    numbers = range(first, stop)
    return pa.table(
        {
            "image": [f"pictures/{n}.png" for n in numbers],
            "n": pa.array(numbers, pa.int64()),
            "place": ["Ulm" if n % 3 else None for n in numbers],
            "day": [date(2024, 1, 1 + n % 2) for n in numbers],
            **more,
        }
    )


def delta_table(path: Path) -> Path:
    """100 rows in partitions, of which the first were written before a column was added; rows were
    deleted, and files rewritten."""
    deltalake = pytest.importorskip("deltalake", reason="pip install 'vlmbatch[delta]'")
    deltalake.write_deltalake(path, rows(0, 70), partition_by=["place", "day"])
    later = rows(70, 120, extra=[n / 2 for n in range(70, 120)])
    deltalake.write_deltalake(path, later, mode="append", schema_mode="merge")
    deltalake.DeltaTable(path).delete("n % 6 = 5")
    return path


def lance_dataset(path: Path) -> Path:
    """100 rows in fragments, with deleted ones among them; a column was added later."""
    lance = pytest.importorskip("lance", reason="pip install 'vlmbatch[lance]'")
    lance.write_dataset(rows(0, 70), path, max_rows_per_file=20)
    lance.dataset(path).add_columns(pa.field("extra", pa.float64()))
    later = rows(70, 120, extra=[n / 2 for n in range(70, 120)])
    lance.write_dataset(later, path, mode="append")
    lance.dataset(path).delete("n % 6 = 5")
    return path


def grow(path: Path) -> None:
    """20 rows more, in a new version."""
    if path.suffix == ".lance":
        import lance

        lance.write_dataset(rows(120, 140, extra=[0.0] * 20), path, mode="append")
    else:
        import deltalake

        deltalake.write_deltalake(path, rows(120, 140, extra=[0.0] * 20), mode="append")


MAKERS = {"photos": delta_table, "photos.lance": lance_dataset}
EXPECTED = sorted(n for n in range(120) if n % 6 != 5)


@pytest.fixture(params=MAKERS)
def table(request, tmp_path) -> Path:
    return MAKERS[request.param](tmp_path / request.param)


def records(manifest: Manifest, wanted: Range | None = None) -> list[dict]:
    """Of each row, its image and its fields."""
    read = stream(manifest, "n", "place", "day", "extra")
    found = list(read.rows(wanted or Range(0, manifest.rows)))
    assert all(row.problem is None for row in found)
    return [{"image": row.images[0].uri, **row.fields} for row in found]


def refused(*paths: object, **filters) -> VlmbatchError:
    with pytest.raises((ManifestError, UsageError)) as caught:
        open_manifest([str(p) for p in paths], **filters)
    return caught.value


def test_the_rows_are_those_of_its_newest_version(table):
    manifest = open_manifest([str(table)])
    found = records(manifest)
    assert sorted(row["n"] for row in found) == EXPECTED
    if table.suffix == ".lance":
        assert [row["n"] for row in found] == EXPECTED
    for row in found:
        n = row["n"]
        assert row == {
            "image": f"pictures/{n}.png",
            "n": n,
            "place": "Ulm" if n % 3 else None,
            "day": date(2024, 1, 1 + n % 2),
            "extra": None if n < 70 else n / 2,
        }
    assert manifest.folder == str(table.parent)
    assert manifest.extent == f"100 rows in version {manifest.files[0].version} of a table"
    starts = list(manifest.boundaries())
    assert len(starts) > 3
    assert starts == sorted(starts)


def test_any_ranges_in_any_order(table):
    manifest = open_manifest([f"{table}/"])
    expected = records(manifest)

    @examples(max_examples=15)
    @given(st.lists(ranges(100), min_size=1, max_size=4))
    def check(several):
        for wanted in several:
            assert records(manifest, wanted) == expected[wanted.first : wanted.stop]

    check()
    columns = stream(manifest, "n")  # from the middle of one file into the next
    numbers = [r.fields["n"] for step in range(0, 100, 7) for r in columns.rows(steps(step))]
    assert numbers == [row["n"] for row in expected]


def steps(first: int) -> Range:
    return Range(first, min(100, first + 7))


def test_a_stored_manifest_stays_at_its_version(table):
    manifest = open_manifest([str(table)])
    before = records(manifest)
    stored = json.loads(json.dumps(manifest.to_json()))
    grow(table)
    newer = open_manifest([str(table)])
    assert newer.rows == 120
    assert newer.identity != manifest.identity
    again = open_manifest(["not looked at"], stored)
    assert again == manifest == Manifest.from_json(stored)
    assert again.identity == manifest.identity
    assert records(again) == before


def test_a_copy_elsewhere_is_the_same_manifest(table, tmp_path):
    copy = tmp_path / "copy" / table.name
    shutil.copytree(table, copy)
    assert open_manifest([str(copy)]).identity == open_manifest([str(table)]).identity


def test_a_version_that_is_gone_is_named(table):
    manifest = open_manifest([str(table)])
    grow(table)
    if table.suffix == ".lance":
        import lance

        lance.dataset(table).cleanup_old_versions(retain_versions=1)
    else:
        import deltalake

        whole = deltalake.DeltaTable(table)
        whole.optimize.compact()
        whole.vacuum(0, dry_run=False, enforce_retention_duration=False, full=True)
    with pytest.raises(ManifestError) as caught:
        open_manifest(["not looked at"], manifest.to_json())
    assert str(table) in caught.value.message
    with pytest.raises(ManifestError):
        records(manifest)
    assert open_manifest([str(table)]).rows == 120


def test_a_run_goes_on_in_the_version_that_it_began_with(table, tmp_path):
    for n in range(140):
        path = table.parent / "pictures" / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(colour=(n, 0, 0)))
    order = [row["n"] for row in records(open_manifest([str(table)]))]
    out = tmp_path / "out"
    words = ["run", table, "-t", "caption", "-o", out, "--carry", "n", "--carry", "day", *echo()]
    assert vlmbatch(*words, "--limit", "40").exit_code == 0
    grow(table)
    result = vlmbatch(*words, "--json")
    assert result.exit_code == 0, result
    assert result.json["ok"] == 60
    found = read_results(out)
    assert found["n"].to_pylist() == order
    assert found["day"].to_pylist() == [date(2024, 1, 1 + n % 2) for n in order]
    assert set(found["status"].to_pylist()) == {"ok"}
    assert run_json(out)["manifest"]["files"][0]["version"] is not None
    plan = vlmbatch("plan", table, "-t", "caption", *echo())
    assert plan.exit_code == 0, plan
    assert "120 rows in version" in plan.stdout


def test_it_is_the_same_on_s3_and_its_library_raises_no_traceback(table, s3_server):
    here = open_manifest([str(table)])
    fs = s3_server.fs()
    with s3_server.in_environment():
        uri = f"s3://{s3_server.new_bucket()}/some"
        fs.put(str(table), f"{uri}/{table.name}", recursive=True)
        manifest = open_manifest([f"{uri}/{table.name}/"])
        assert manifest.folder == uri
        assert manifest.identity == here.identity
        assert Manifest.from_json(manifest.to_json()) == manifest
        assert records(manifest, Range(33, 71)) == records(here, Range(33, 71))
        for log in (*table.glob("_delta_log/*.json"), *table.glob("_versions/*")):
            log.write_bytes(b"no log")
            fs.pipe_file(f"{uri}/{log.relative_to(table.parent)}", b"no log")
        with pytest.raises(ManifestUnreachable, match=f"cannot read the .* {uri}/") as caught:
            open_manifest([f"{uri}/{table.name}"])
        assert "AWS_REGION" in str(caught.value.hint)
    error = refused(table)
    assert f"{table}: " in error.message
    assert error.message.isprintable()


# what cannot be read as it is


def test_without_the_library_the_command_that_adds_it_is_named(tmp_path, monkeypatch):
    for log, extra, name in (
        ("a/_delta_log/0.json", "delta", "deltalake"),
        ("b/_versions/1.manifest", "lance", "lance"),
    ):
        path = tmp_path / log
        path.parent.mkdir(parents=True)
        path.write_bytes(b"{}")
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        error = refused(path.parent.parent)
        assert isinstance(error, UsageError)
        assert error.hint == f"pip install 'vlmbatch[{extra}]'"


@pytest.mark.parametrize(
    ("log", "called"),
    [
        ("_delta_log/00000000000000000000.json", "a Delta table"),
        (".hoodie/hoodie.properties", "a Hudi table"),
        ("metadata/00000-a.metadata.json", "an Iceberg table"),
    ],
)
def test_old_files_of_a_table_are_never_read_as_a_folder(log, called, tmp_path):
    import pyarrow.parquet as pq

    (tmp_path / "t" / log).parent.mkdir(parents=True)
    (tmp_path / "t" / log).write_bytes(b"{}")
    pq.write_table(rows(0, 3), tmp_path / "t" / "old.parquet")
    pq.write_table(rows(0, 3), tmp_path / "other.parquet")
    error = refused(tmp_path)
    assert error.message == f"{tmp_path} holds {called}: t"
    assert open_manifest([str(tmp_path / "*.parquet")]).rows == 3
    if called != "a Delta table":
        assert refused(tmp_path / "t").message.startswith(f"{tmp_path / 't'} is {called}, whose")
        return
    assert "no longer part of the Delta table" in refused(tmp_path / "t" / "*.parquet").message
    assert "--include" in refused(tmp_path / "t", include=["*.parquet"]).message


def test_deletion_vectors_are_refused(tmp_path):
    deltalake = pytest.importorskip("deltalake", reason="pip install 'vlmbatch[delta]'")
    vectors = {"delta.enableDeletionVectors": "true"}
    deltalake.write_deltalake(tmp_path / "t", rows(0, 9), configuration=vectors)
    assert open_manifest([str(tmp_path / "t")]).rows == 9  # it may have some, and has none
    first = tmp_path / "t" / "_delta_log" / f"{0:020}.json"
    lines = first.read_text().splitlines()
    (add,) = (action["add"] for action in map(json.loads, lines) if "add" in action)
    remove = {"path": add["path"], "dataChange": True, "deletionTimestamp": 1}
    vector = {
        "storageType": "i",
        "pathOrInlineDv": z85(row_one := deleted_row_one()),
        "sizeInBytes": len(row_one),
        "cardinality": 1,
    }
    actions = [{"remove": remove}, {"add": {**add, "deletionVector": vector}}]
    (first.parent / f"{1:020}.json").write_text("\n".join(map(json.dumps, actions)))
    error = refused(tmp_path / "t")
    assert "has deletion vectors" in error.message
    assert "PURGE" in str(error.hint)


def deleted_row_one() -> bytes:
    """Row 1 alone, as a 64-bit roaring bitmap behind Delta's magic number.

    Source: github.com/delta-io/delta/blob/master/PROTOCOL.md, "Deletion Vector Format".
    """
    bitmap = struct.pack("<IIHHIH", 12346, 1, 0, 0, 16, 1)
    return struct.pack("<IQI", 1681511377, 1, 0) + bitmap


def z85(data: bytes) -> str:
    ours = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
    z85 = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
    padded = data + bytes(-len(data) % 4)
    return base64.b85encode(padded).translate(bytes.maketrans(ours, z85)).decode()


def test_column_mapping_and_shallow_clones_are_refused(tmp_path):
    deltalake = pytest.importorskip("deltalake", reason="pip install 'vlmbatch[delta]'")
    mapping = {"delta.columnMapping.mode": "name"}
    deltalake.write_deltalake(tmp_path / "mapped", rows(0, 9), configuration=mapping)
    assert "maps its columns by name" in refused(tmp_path / "mapped").message
    deltalake.write_deltalake(tmp_path / "clone", rows(0, 9))
    log = tmp_path / "clone" / "_delta_log" / f"{0:020}.json"
    log.write_text(log.read_text().replace('"path":"', f'"path":"file://{tmp_path}/'))
    assert "outside of its folder" in refused(tmp_path / "clone").message
    deltalake.write_deltalake(tmp_path / "up", rows(0, 9))
    log = tmp_path / "up" / "_delta_log" / f"{0:020}.json"
    log.write_text(log.read_text().replace('"path":"', '"path":"../clone/'))
    assert "outside of its folder" in refused(tmp_path / "up").message


# images in it


@pytest.mark.parametrize("metadata", [None, {"lance-encoding:blob": "true"}], ids=["plain", "blob"])
def test_inline_images_of_lance_and_its_blobs(metadata, tmp_path):
    lance = pytest.importorskip("lance", reason="pip install 'vlmbatch[lance]'")
    images = [picture(4 + n) for n in range(9)]
    schema = pa.schema([pa.field("image", pa.large_binary(), metadata=metadata)])
    table = pa.table({"image": images}, schema=schema)
    lance.write_dataset(table, tmp_path / "a.lance", data_storage_version="2.0")
    manifest = open_manifest([str(tmp_path / "a.lance")])
    found = list(stream(manifest).rows(Range(0, 9)))
    assert [row.images[0].data for row in found] == images


PEAK = """
    import sys
    import lance, pandas
    from vlmbatch.manifest import RowStream, open_manifest
    from vlmbatch.manifest.columns import choose_columns
    from vlmbatch.records import Range

    def mib(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024

    manifest = open_manifest([sys.argv[1]])
    stream = RowStream(manifest, choose_columns(manifest.schema, {}, (), where=""))
    before, size = mib("VmRSS"), 0
    for row in stream.rows(Range(0, manifest.rows)):
        size += len(row.images[0].data)
    print(size, mib("VmHWM") - before)
"""


@LINUX
def test_150_mb_of_inline_images_in_a_lance_file_are_read_a_little_at_a_time(tmp_path):
    lance = pytest.importorskip("lance", reason="pip install 'vlmbatch[lance]'")
    schema = pa.schema([pa.field("image", pa.binary())])
    batches = (
        pa.record_batch([pa.array([bytes([n, i]) * 50_000 for i in range(100)])], schema)
        for n in range(15)
    )
    lance.write_dataset(batches, tmp_path / "a.lance", schema=schema)
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path / "a.lance")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(found[0]) == 150_000_000
    assert float(found[1]) < 100, "MiB above what the libraries take"
