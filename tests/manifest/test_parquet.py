"""Parquet files as one sequence of rows: listed once, read a little at a time, in any ranges."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import ranges
from vlmbatch.errors import ManifestError, UsageError
from vlmbatch.manifest import Manifest, RowStream, open_manifest
from vlmbatch.manifest.columns import choose_columns
from vlmbatch.records import Range

ROWS = 137
LINUX = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc on this system")


def write(path: Path, rows: int, *, start: int = 0, row_group: int = 50, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(start, start + rows)
    table = pa.table(
        {
            "image": pa.array([f"{n}.png" for n in numbers], pa.string()),
            "n": pa.array(numbers, pa.int64()),
            **columns,
        }
    )
    pq.write_table(table, path, row_group_size=row_group)
    return path


def stream(manifest: Manifest, *wanted: str) -> RowStream:
    return RowStream(manifest, choose_columns(manifest.schema, {}, wanted, where="here"))


def names(*paths: object) -> list[str]:
    return [file.name for file in open_manifest([str(p) for p in paths]).files]


def refused(*paths: object) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        open_manifest([str(p) for p in paths])
    return caught.value


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Manifest:
    """Files with row groups of odd sizes, and files without rows before, between and after."""
    folder = tmp_path_factory.mktemp("several")
    start = 0
    for number, (rows, group) in enumerate(
        [(0, 5), (40, 7), (0, 5), (1, 1), (59, 100), (37, 13), (0, 1)]
    ):
        write(folder / f"{number}.parquet", rows, start=start, row_group=group)
        start += rows
    assert start == ROWS
    return open_manifest([str(folder)])


@examples(max_examples=150)
@given(st.data())
def test_the_rows_of_any_ranges_are_those_of_the_whole_table(several, data):
    rows = stream(several, "n")
    position = 0
    for _ in range(data.draw(st.integers(1, 5))):
        if position < ROWS and data.draw(st.booleans()):  # go on where the last one ended
            wanted = Range(position, data.draw(st.integers(position + 1, ROWS)))
        else:
            wanted = data.draw(ranges(ROWS))
        found = list(rows.rows(wanted))
        expected = list(range(wanted.first, wanted.stop))
        assert [row.row for row in found] == expected
        assert [row.fields["n"] for row in found] == expected
        assert [row.images[0].uri for row in found] == [f"{n}.png" for n in expected]
        position = wanted.stop


def test_boundaries_are_where_files_and_row_groups_begin(several):
    expected = [0, 7, 14, 21, 28, 35, 40, 41, 100, 113, 126]
    assert sorted(set(several.boundaries()) - {ROWS}) == expected  # an empty file begins at the end
    assert list(several.boundaries()) == sorted(several.boundaries())
    assert several.rows == ROWS


def test_a_manifest_survives_run_json(several):
    again = Manifest.from_json(json.loads(json.dumps(several.to_json())))
    assert again == several
    assert again.identity == several.identity
    assert open_manifest(["not looked at"], several.to_json()) == several


@LINUX
def test_consecutive_ranges_go_on_in_the_open_file(tmp_path):
    path = write(tmp_path / "a.parquet", 5_000)
    rows = stream(open_manifest([str(path)]))

    def opened() -> list[str]:
        links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return [link for link in links if link == os.path.realpath(path)]

    assert [row.row for row in rows.rows(Range(0, 10))] == list(range(10))
    assert len(opened()) == 1
    path.unlink()  # it could not be opened again
    assert [row.row for row in rows.rows(Range(10, 5_000))] == list(range(10, 5_000))
    with pytest.raises(ManifestError, match=r"cannot read .*a\.parquet"):
        list(rows.rows(Range(5, 6)))
    assert opened() == []


def test_a_range_that_was_left_early_can_be_read_again(several):
    rows = stream(several, "n")
    some = rows.rows(Range(20, 60))
    assert [next(some).row for _ in range(5)] == [20, 21, 22, 23, 24]
    some.close()
    assert [row.fields["n"] for row in rows.rows(Range(25, 50))] == list(range(25, 50))
    assert [row.fields["n"] for row in rows.rows(Range(20, 30))] == list(range(20, 30))


def test_a_file_that_changed_is_noticed_when_it_is_read(tmp_path):
    write(tmp_path / "a.parquet", 10)
    write(tmp_path / "b.parquet", 10, start=10)
    manifest = open_manifest([str(tmp_path)])
    stored = manifest.to_json()
    write(tmp_path / "b.parquet", 10, start=11)
    rows = stream(manifest)
    assert len(list(rows.rows(Range(0, 10)))) == 10
    with pytest.raises(ManifestError, match=r"b\.parquet changed since this run was planned"):
        list(rows.rows(Range(10, 11)))
    assert open_manifest([str(tmp_path)], stored).identity != manifest.identity
    write(tmp_path / "a.parquet", 9)
    with pytest.raises(ManifestError, match=r"a\.parquet changed"):
        Manifest.from_json(stored)


def test_a_copy_elsewhere_is_the_same_manifest(tmp_path):
    for folder in ("one", "two"):
        write(tmp_path / folder / "a.parquet", 10)
        write(tmp_path / folder / "sub" / "b.parquet", 10)
        os.utime(tmp_path / folder / "a.parquet", (len(folder), 1_000_000))
    one, two = (open_manifest([str(tmp_path / folder)]) for folder in ("one", "two"))
    assert one.identity == two.identity
    assert one.folder != two.folder
    assert open_manifest([str(tmp_path / "one" / "a.parquet")]).identity != one.identity


def test_a_new_file_is_not_part_of_a_listing_that_was_stored(tmp_path):
    write(tmp_path / "a.parquet", 10)
    stored = open_manifest([str(tmp_path)]).to_json()
    write(tmp_path / "b.parquet", 10)
    assert open_manifest([str(tmp_path)], stored).rows == 10
    assert open_manifest([str(tmp_path)]).rows == 20


def test_a_folder_is_read_in_the_order_of_its_paths_without_hidden_files(tmp_path):
    for name in ("b", "a", "sub/c", "a b", "ü", "_x", ".y", "__z/d", ".git/e", "10", "9"):
        write(tmp_path / f"{name}.parquet", 1)
    (tmp_path / "readme.txt").write_text("not read")
    (tmp_path / "folder.parquet").mkdir()
    found = names(tmp_path)
    assert found == sorted(f"{n}.parquet" for n in ("b", "a", "sub/c", "a b", "ü", "10", "9"))


def test_files_and_globs(tmp_path, monkeypatch):
    for name in ("x/a", "x/b", "y/a", "z"):
        write(tmp_path / f"{name}.parquet", 1)
    assert names(tmp_path / "x" / "a.parquet") == ["a.parquet"]
    assert names(tmp_path / "*" / "a.parquet") == ["x/a.parquet", "y/a.parquet"]
    assert names(tmp_path / "**" / "*.parquet") == [
        "x/a.parquet",
        "x/b.parquet",
        "y/a.parquet",
        "z.parquet",
    ]
    assert names(tmp_path / "x", tmp_path / "x" / "a.parquet") == ["a.parquet", "b.parquet"]
    assert names(tmp_path / "x", tmp_path / "y") == ["../y/a.parquet", "a.parquet", "b.parquet"]
    monkeypatch.chdir(tmp_path / "x")
    for relative in ("a.parquet", "./a.parquet", "*.parquet", "."):
        assert open_manifest([relative]).folder == str(tmp_path / "x")
    assert names("../y/a.parquet") == ["a.parquet"]


@pytest.mark.parametrize("name", ["a b.parquet", "ünï.parquet", "100%25.parquet", "a#b?c.parquet"])
def test_any_name_of_a_file_can_be_given_as_a_path_or_as_a_uri(tmp_path, name):
    path = write(tmp_path / name, 3)
    assert names(path) == [name]
    assert names(path.as_uri()) == [name]
    assert names(path.as_uri().replace("file://", "file://localhost")) == [name]
    assert len(list(stream(open_manifest([str(path)])).rows(Range(0, 3)))) == 3


def test_a_name_with_brackets_is_a_name_before_it_is_a_pattern(tmp_path):
    write(tmp_path / "a[1].parquet", 3)
    assert names(tmp_path / "a[1].parquet") == ["a[1].parquet"]


def test_what_is_not_there_is_named_with_what_is(tmp_path):
    write(tmp_path / "photos.parquet", 1)
    error = refused(tmp_path / "fotos.parquet")
    assert error.message == f"no manifest {tmp_path / 'fotos.parquet'}"
    assert error.hint == "there: photos.parquet"
    assert "there is no folder" in refused(tmp_path / "none" / "a.parquet").message
    assert refused(tmp_path / "*.csv").message == f"nothing matches {tmp_path / '*.csv'}"
    (tmp_path / "empty").mkdir()
    assert "no manifest and no image in the folder" in refused(tmp_path / "empty").message
    assert "JSONL" in refused(tmp_path / "empty" / "x.parquet").hint
    with pytest.raises(UsageError, match="nothing here reads nope:"):
        open_manifest(["nope://bucket/a.parquet"])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"image,question\n" * 9, b"\0" * 8 + b"PAR1"])
def test_a_file_that_is_not_parquet_is_named(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    assert f"cannot read {path}: " in refused(path).message


def test_half_a_file_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", 1000)
    path.write_bytes(path.read_bytes()[:-100])
    assert (
        refused(path).message == f"cannot read {path}: it is no Parquet file, or its end is missing"
    )


@LINUX
def test_a_page_that_is_damaged_is_a_manifest_error_with_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", 1000)
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    manifest = open_manifest([str(path)])
    with pytest.raises(ManifestError, match=r"cannot read .*a\.parquet"):
        list(stream(manifest).rows(Range(0, 1000)))


def test_files_with_other_columns_are_refused_with_both_named(tmp_path):
    write(tmp_path / "a.parquet", 1)
    write(tmp_path / "b.parquet", 1, extra=pa.array(["x"]))
    error = refused(tmp_path)
    assert str(tmp_path / "b.parquet") in error.message
    assert "extra: string" in error.message


def test_images_of_every_type_are_read(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "text": (pa.string(), "a.png", ("a.png", None)),
        "large": (pa.large_string(), "a.png", ("a.png", None)),
        "binary": (pa.binary(), b"png", (None, b"png")),
        "large_binary": (pa.large_binary(), b"png", (None, b"png")),
        "struct": (struct, {"bytes": b"png", "path": "a.png"}, ("a.png", b"png")),
        "dictionary": (pa.dictionary(pa.int32(), pa.string()), "a.png", ("a.png", None)),
    }
    for name, (kind, value, (uri, data)) in columns.items():
        arrays = {
            "image": pa.array([value, None, value], kind),
            "list": pa.array([[value, value], [], None], pa.list_(kind)),
        }
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(arrays), path)
        manifest = open_manifest([str(path)])
        for column, counts in (("image", [1, 0, 1]), ("list", [2, 0, 0])):
            chosen = choose_columns(manifest.schema, {"image": column}, (), where="here")
            rows = list(RowStream(manifest, chosen).rows(Range(0, 3)))
            assert [len(row.images) for row in rows] == counts, (name, column)
            assert [row.problem is None for row in rows] == [count > 0 for count in counts]
            assert all((i.uri, i.data) == (uri, data) for row in rows for i in row.images)


PEAK = """
    import sys
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
def test_a_row_group_of_300_mb_of_inline_images_costs_a_few_of_its_pages(tmp_path):
    """pyarrow writes pages of ``write_batch_size`` values, however large they are."""
    path, rows, size = tmp_path / "big.parquet", 3_000, 100_000
    with pq.ParquetWriter(
        path,
        pa.schema({"image": pa.binary()}),
        compression="none",
        use_dictionary=False,
        write_batch_size=128,
    ) as writer:
        blobs = [bytes([n % 256]) * size for n in range(rows)]
        writer.write_table(pa.table({"image": pa.array(blobs, pa.binary())}), row_group_size=rows)
    assert pq.read_metadata(path).num_row_groups == 1
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(found[0]) == rows * size
    assert float(found[1]) < 150, "MiB above what the libraries take"
