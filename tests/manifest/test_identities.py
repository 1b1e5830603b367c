"""Ids of whole manifests are those of their rows, whatever the format and the types."""

import datetime
import shutil
import struct
from decimal import Decimal
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.harness import picture
from tests.manifest import formats
from tests.manifest.test_formats import WRITERS
from vlmbatch.errors import ManifestError, UsageError
from vlmbatch.manifest import Columns, Manifest, RowStream, open_manifest
from vlmbatch.manifest.columns import choose_columns
from vlmbatch.manifest.identities import BATCH_ROWS, check_identifiable, identities, streamed
from vlmbatch.records import Range


def columns_of(manifest: Manifest, *wanted: str, **given: str) -> Columns:
    return choose_columns(manifest.schema, given, wanted, where="here")


def table(batches) -> dict[str, list]:
    batches = list(batches)
    assert all(0 < batch.num_rows <= BATCH_ROWS for batch in batches)
    return pa.Table.from_batches(batches).to_pydict() if batches else {}


def assert_same(manifest: Manifest, columns: Columns) -> list[str]:
    """The rows' own ids; those of ``identities`` are the same, with and without images."""
    rows = list(RowStream(manifest, columns).rows(Range(0, manifest.rows)))
    ids = [row.id for row in rows]
    assert table(identities(manifest, columns)) == {"position": list(range(len(ids))), "id": ids}
    found = table(identities(manifest, columns, images=True))
    assert found == table(streamed(manifest, columns, images=True))
    assert (found["position"], found["id"]) == (list(range(len(ids))), ids)
    for row, uris in zip(rows, found["images"], strict=True):
        if uris is not None:
            assert uris == [image.uri for image in row.images]
            assert not any(image.data for image in row.images)
    return ids


# what the columns of a table may hold

WORDS = st.none() | st.sampled_from(["", "a", "ü 线", "x" * 300]) | st.text(max_size=4)
URIS = WORDS | st.sampled_from(
    [
        *("pictures/1.png", "s3://bucket/a b.png", "https://x.org/a.png", "what?.png"),
        *("https://u:p@x.org/a.png?k=v#f", "HTTPS://X.org/a", "data:image/png;base64,AA?=="),
        *("zip://a.png::https://u:p@x.org/a.zip?k=v", "s3:///a", "file:///tmp/a.png#page=2"),
        *("https://x.org/a\tb", "https://x.org?k", "https://[::1/a", "data://x,y", "s3://b/a:b"),
    ]
)
INTEGERS = st.none() | st.integers(0, 127)
EXACT = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
ID_KINDS = [
    *[(kind, WORDS) for kind in EXACT],
    *[(kind, INTEGERS) for kind in (pa.int8(), pa.uint64(), pa.dictionary(pa.int8(), pa.int32()))],
    (pa.int64(), st.none() | st.integers(-(2**63), 2**63 - 1)),
    (pa.float64(), st.none() | st.floats()),
    (pa.bool_(), st.none() | st.booleans()),
    (pa.binary(), st.none() | st.binary(max_size=3)),
    (pa.null(), st.none()),
    (pa.timestamp("us"), st.none() | st.integers(-(2**61), 2**61)),  # beyond the year 9999, too
    (pa.date32(), st.none() | st.dates()),
    (pa.decimal128(9, 2), st.none() | st.sampled_from([Decimal("1.50"), Decimal("-0.01")])),
    (pa.list_(pa.string()), st.none() | st.lists(WORDS, max_size=2)),
    (pa.struct([("a", pa.int8())]), st.none() | st.fixed_dictionaries({"a": INTEGERS})),
]
DATA = st.none() | st.binary(max_size=3)
PATHS = st.none() | st.fixed_dictionaries({"path": URIS})
BOTH = st.none() | st.fixed_dictionaries({"bytes": DATA, "path": URIS})
IMAGE_KINDS = [
    *[(kind, URIS) for kind in EXACT],
    *[(pa.list_(kind), st.none() | st.lists(URIS, max_size=3)) for kind in EXACT[:2]],
    (pa.struct([("path", pa.string())]), PATHS),
    (pa.list_(pa.struct([("path", pa.string())])), st.none() | st.lists(PATHS, max_size=2)),
    (pa.binary(), DATA),
    (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), BOTH),
    (pa.list_(pa.binary()), st.none() | st.lists(DATA, max_size=2)),
]
ASKED_KINDS = [
    *[(kind, WORDS) for kind in EXACT],
    (pa.list_(pa.string()), st.none() | st.lists(WORDS, max_size=3)),
    (pa.null(), st.none()),
]


@st.composite
def columns_and_rows(draw: st.DrawFn) -> tuple[pa.Table, dict[str, str], list[str]]:
    """(a table, what --column renames, what --carry names)."""
    rows = draw(st.integers(1, 12))

    def column(kinds) -> pa.Array:
        kind, values = draw(st.sampled_from(kinds))
        found = draw(st.lists(values, min_size=rows, max_size=rows))
        if pa.types.is_dictionary(kind):
            return pa.array(found, kind.value_type).dictionary_encode().cast(kind)
        return pa.array(found, kind)

    table, renamed, carried = {"note": column([(pa.string(), WORDS)])}, {}, ["note"]
    for ours, kinds in (
        ("image", IMAGE_KINDS),
        ("id", ID_KINDS),
        *((name, ASKED_KINDS) for name in ("question", "questions", "phrase", "labels")),
    ):
        if ours != "image" and draw(st.booleans()):
            continue
        theirs = ours
        if draw(st.integers(0, 3)) == 0:
            theirs = renamed[ours] = f"my.{ours}"
            if ours != "image" and draw(st.booleans()):
                table[ours] = column([(pa.string(), WORDS)])  # which is nothing but carried
                carried.append(ours)
        table[theirs] = column(kinds)
    return pa.table(table), renamed, carried


@examples(max_examples=40)
@given(columns_and_rows(), st.integers(1, 12))
def test_ids_of_parquet_are_those_of_its_rows(tmp_path_factory, given, group):
    rows, renamed, carried = given
    folder = tmp_path_factory.mktemp("table")
    pq.write_table(rows, folder / "a.parquet", row_group_size=group)
    pq.write_table(rows.slice(0, 0), folder / "b.parquet")
    pq.write_table(rows.slice(1), folder / "c.parquet")
    manifest = open_manifest([str(folder)])
    assert_same(manifest, columns_of(manifest, *carried, **renamed))
    shutil.rmtree(folder)


# every format, and what there is besides


@pytest.mark.parametrize("name", WRITERS)
def test_ids_of_every_format_are_those_of_its_rows(name, tmp_path):
    for stem, rows in (("a", range(40)), ("b", range(0)), ("c", range(40, 150))):
        WRITERS[name](tmp_path / name.replace("a.", f"{stem}.", 1), rows)
    manifest = open_manifest([str(tmp_path)])
    ids = assert_same(manifest, columns_of(manifest))
    assert len(set(ids)) == 150
    for limit in (0, 1, 40, 41, 149, 1000):
        found = table(identities(manifest, columns_of(manifest), limit=limit))
        assert found.get("id", []) == ids[:limit]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_rows_of_text_without_an_id_or_with_a_broken_line(ending, tmp_path):
    lines = {
        "jsonl": [b'{"image": "1.png", "q": "why?"}', b'{"image": "\xff"}', b"{", b'{"q": "a"}'],
        "csv": [b"image,q", b"1.png,why?", b"\xff,", b"3.png", b",a"],
    }[ending]
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b"\n".join(lines))
    manifest = open_manifest([str(path)])
    ids = assert_same(manifest, columns_of(manifest, question="q"))
    assert len(ids) == 4


def test_a_folder_of_images(tmp_path):
    for name in ("a.png", "x/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    manifest = open_manifest([str(tmp_path)])
    assert assert_same(manifest, columns_of(manifest)) == ["a", "x/b"]


def test_a_folder_names_the_id_of_its_rows(tmp_path):
    for folder in ("key=a%20b", "key=__HIVE_DEFAULT_PARTITION__", "key=c"):
        (tmp_path / folder).mkdir()
        formats.write_parquet(tmp_path / folder / "a.parquet", range(3))
    manifest = open_manifest([str(tmp_path)])
    ids = assert_same(manifest, columns_of(manifest, id="key"))
    assert (ids[3:6], ids[6:]) == (["a b"] * 3, ["c"] * 3)
    assert {len(identity) for identity in ids[:3]} == {32}


def test_a_text_that_is_no_utf8_costs_no_other_row_its_id(tmp_path):
    broken = pa.array([b"a", b"\xff", b"", None, b"c"], pa.binary()).view(pa.string())
    images = pa.array([b"1.png", b"2.png", b"\xfe", b"4.png", b"5.png"], pa.binary())
    given = {"image": images.view(pa.string()), "id": broken, "question": broken}
    pq.write_table(pa.table(given), tmp_path / "a.parquet")
    manifest = open_manifest([str(tmp_path)])
    ids = assert_same(manifest, columns_of(manifest))
    assert (ids[0], ids[4]) == ("a", "c")
    del given["id"]
    pq.write_table(pa.table(given), tmp_path / "a.parquet")
    manifest = open_manifest([str(tmp_path)])
    assert len(set(assert_same(manifest, columns_of(manifest)))) == 5


def test_what_python_cannot_hold_has_the_default_id(tmp_path):
    seconds = pa.array([0, 10**15, None], pa.int64()).cast(pa.timestamp("s"))
    rows = pa.table({"image": ["1.png", "2.png", "3.png"], "id": seconds})
    pq.write_table(rows, tmp_path / "a.parquet")
    manifest = open_manifest([str(tmp_path)])
    first, *rest = assert_same(manifest, columns_of(manifest))
    assert first == str(datetime.datetime(1970, 1, 1))
    assert {len(identity) for identity in rest} == {32}


def test_more_rows_than_a_batch_holds(tmp_path):
    count = BATCH_ROWS + 10
    numbers = pa.array(range(count))
    texts = numbers.cast(pa.string())
    pq.write_table(pa.table({"image": texts, "id": numbers}), tmp_path / "a.parquet")
    manifest = open_manifest([str(tmp_path)])
    batches = list(identities(manifest, columns_of(manifest)))
    assert max(batch.num_rows for batch in batches) == BATCH_ROWS
    assert table(batches)["id"] == texts.to_pylist()
    assert (
        table(identities(manifest, columns_of(manifest), limit=BATCH_ROWS + 1))["id"]
        == (texts.to_pylist()[: BATCH_ROWS + 1])
    )


def spoil_images(path: Path, column: int) -> None:
    """Overwrites the pages of a column in every row group but the first; the footer stays."""
    metadata = pq.read_metadata(path)
    with path.open("r+b") as file:
        for group in range(1, metadata.num_row_groups):
            chunk = metadata.row_group(group).column(column)
            file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
            file.write(struct.pack("B", 255) * chunk.total_compressed_size)


def test_images_inside_the_manifest_are_read_for_rows_without_an_id_alone(tmp_path):
    """Only the first row group still has images that can be read: none of the others is."""
    rows = pa.table(
        {"image": [bytes([n]) * 100 for n in range(40)], "id": [None, "", *map(str, range(2, 40))]}
    )
    path = tmp_path / "a.parquet"
    pq.write_table(rows, path, row_group_size=10, use_dictionary=False)
    manifest = open_manifest([str(path)])
    ids = assert_same(manifest, columns_of(manifest))
    spoil_images(path, 0)
    columns = columns_of(manifest)
    with pytest.raises(ManifestError):
        list(streamed(manifest, columns))
    found = table(identities(manifest, columns, images=True))
    assert (found["id"], found["images"]) == (ids, [None] * 40)
    assert ids[2:] == [str(n) for n in range(2, 40)]
    assert len(ids[0]) == len(ids[1]) == 32
    assert ids[0] != ids[1]


def test_a_footer_that_counts_more_rows_than_there_are(tmp_path):
    """Somewhere among the 20s (10 in zigzag) are the rows of the file and of its row group."""
    path = tmp_path / "a.parquet"
    rows = {"image": [f"{n}.png" for n in range(10)], "id": [f"i{n}" for n in range(10)]}
    pq.write_table(pa.table(rows), path, compression="none")
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    tens = [at for at in range(footer, len(whole) - 8) if whole[at] == 20]
    messages = []
    for one, other in combinations(tens, 2):
        broken = bytearray(whole)
        broken[one] = broken[other] = 22
        path.write_bytes(broken)
        try:
            manifest = open_manifest([str(path)])
        except ManifestError:
            continue
        if manifest.rows == 11:
            with pytest.raises(ManifestError) as caught:
                list(identities(manifest, columns_of(manifest)))
            messages.append(caught.value.message)
    assert f"at row 10: {path} ends before the 11 rows that were counted" in messages


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.tar"])
def test_a_file_that_changed_is_noticed(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path, range(100))
    manifest = open_manifest([str(path)])
    WRITERS[name](path, range(50))
    with pytest.raises(ManifestError, match=r"at row 0: .*changed since this run was planned"):
        list(identities(manifest, columns_of(manifest)))


IMAGES = {
    "bytes": pa.array([b"x"], pa.binary()),
    "struct": pa.array([{"bytes": b"x", "path": "a"}]),
    "list": pa.array([[b"x"]]),
    "dictionary": pa.array([b"x"]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_inside_the_manifest_need_an_id_column(kind, tmp_path):
    rows = pa.table({"image": IMAGES[kind], "key": ["k"]})
    pq.write_table(rows, tmp_path / "a.parquet")
    manifest = open_manifest([str(tmp_path)])
    with pytest.raises(UsageError, match="embedded images needs an id column") as caught:
        check_identifiable(manifest, columns_of(manifest))
    assert "--column id=NAME" in str(caught.value.hint)
    check_identifiable(manifest, columns_of(manifest, id="key"))


def test_references_need_no_id_column(tmp_path):
    pq.write_table(pa.table({"image": [{"path": "a.png"}]}), tmp_path / "a.parquet")
    manifest = open_manifest([str(tmp_path)])
    check_identifiable(manifest, columns_of(manifest))


def test_a_manifest_in_a_store(rclone_server, tmp_path):
    formats.write_parquet(tmp_path / "a.parquet", range(900))
    uri = f"s3://{rclone_server.new_bucket()}/a.parquet"
    with rclone_server.in_environment():
        rclone_server.fs().put_file(str(tmp_path / "a.parquet"), uri)
        manifest = open_manifest([uri])
        assert assert_same(manifest, columns_of(manifest)) == [f"row {n}" for n in range(900)]


@pytest.mark.parametrize("odd", [None, "https://u:p@x.org/a.png?k=v", "DATA:,x", "http://x?y"])
def test_references_with_secrets_among_others(odd, tmp_path):
    images = ["a.png", "", "s3://bucket/a b.png", "http://x.org:80/ü", "data://x/y", odd]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    manifest = open_manifest([str(tmp_path)])
    assert_same(manifest, columns_of(manifest))
