"""Every format is the same rows in any ranges; what a resume does with each; identities."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.harness import echo, picture, read_results, run_json, vlmbatch
from tests.manifest import formats
from tests.manifest.formats import stream
from tests.strategies import ranges
from vlmbatch.errors import ManifestError
from vlmbatch.manifest import Manifest, open_manifest
from vlmbatch.records import Range

ROWS = 2600  # more than two starts of a text's index
WRITERS = {
    "a.parquet": formats.write_parquet,
    "a.jsonl": formats.write_jsonl,
    "a.jsonl.gz": formats.zipped(formats.write_jsonl),
    "a.ndjson.zst": formats.zipped(formats.write_jsonl),
    "a.csv": formats.write_csv,
    "a.csv.gz": formats.zipped(formats.write_csv),
    "a.tsv": lambda path, rows: formats.write_csv(path, rows, "\t"),
    "a.tsv.zst": formats.zipped(lambda path, rows: formats.write_csv(path, rows, "\t")),
    "a.tar": formats.write_tar,
}


def naive(name: str, path: Path, plain: Path) -> list[dict]:
    """What the simplest reader finds; of compressed text, in the same text before."""
    if name == "a.tar":
        return list(formats.read_tar(path))
    if "json" in name:
        return list(formats.read_jsonl(plain))
    if name == "a.parquet":
        return [formats.record(n) for n in range(ROWS)]
    return list(formats.read_csv(plain, "\t" if "tsv" in name else ","))


@pytest.fixture(scope="module", params=WRITERS)
def case(request, tmp_path_factory) -> tuple[Manifest, list[dict]]:
    """A manifest of one format, in three files of which one has no rows, and its rows."""
    folder = tmp_path_factory.mktemp("case")
    expected: list[dict] = []
    for stem, rows in (("a", range(1400)), ("b", range(0)), ("c", range(1400, ROWS))):
        name = request.param.replace("a.", f"{stem}.", 1)
        WRITERS[request.param](folder / name, rows)
        plain = folder.parent / f"plain-{name}".removesuffix(".gz").removesuffix(".zst")
        if plain.suffix == ".csv":
            formats.write_csv(plain, rows)
        elif plain.suffix == ".tsv":
            formats.write_csv(plain, rows, "\t")
        elif "json" in plain.suffix:
            formats.write_jsonl(plain, rows)
        if request.param != "a.parquet":
            expected += naive(request.param, folder / name, plain)
    if request.param == "a.parquet":
        expected = [formats.record(n) for n in range(ROWS)]
    return open_manifest([str(folder)]), expected


def test_any_ranges_in_any_order_are_the_rows_of_a_naive_reader(case):
    manifest, expected = case
    assert manifest.rows == len(expected) == ROWS
    rows = stream(manifest, "note")

    @examples(max_examples=15)
    @given(st.data())
    def check(data):
        position = 0
        for _ in range(data.draw(st.integers(1, 4))):
            if position < ROWS and data.draw(st.booleans()):  # go on where the last one ended
                wanted = Range(position, data.draw(st.integers(position + 1, ROWS)))
            else:
                wanted = data.draw(ranges(ROWS))
            found = list(rows.rows(wanted))
            assert [row.row for row in found] == list(range(wanted.first, wanted.stop))
            for row in found:
                asked = expected[row.row]
                assert row.problem is None
                assert (row.id, row.fields["note"]) == (asked["id"], asked["note"] or None)
                image = row.images[0].data if row.images[0].data else row.images[0].uri
                assert image == asked["image"]
            position = wanted.stop

    check()


def test_a_manifest_survives_run_json(case):
    manifest, _ = case
    stored = json.loads(json.dumps(manifest.to_json()))
    again = Manifest.from_json(stored)
    assert again == manifest
    assert again.identity == manifest.identity == open_manifest(["-"], stored).identity
    assert {file["format"] for file in stored["files"]} == {manifest.files[0].format}


def test_boundaries_ascend_and_cut_long_files(case):
    manifest, _ = case
    found = list(manifest.boundaries())
    assert found == sorted(found)
    assert {0, 1400} <= set(found)
    compressed = manifest.files[0].name.endswith((".gz", ".zst"))
    assert any(0 < row < 1400 for row in found) != compressed


def test_the_identity_is_that_of_the_content_alone(case, tmp_path):
    manifest, _ = case
    copy = tmp_path / "copy"
    shutil.copytree(manifest.folder, copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1_000_000))
    assert open_manifest([str(copy)]).identity == manifest.identity
    first = copy / manifest.files[0].name
    data = bytearray(first.read_bytes())
    if first.suffix == ".tar":  # the index knows places and names, not contents
        formats.write_tar(first, range(1, 1401))
        data = bytearray(first.read_bytes())
    elif first.suffix == ".parquet":
        formats.write_parquet(first, range(1, 1401))
        data = bytearray(first.read_bytes())
    else:
        data = data + data if first.suffix in (".gz", ".zst") else data.replace(b"7", b"8", 1)
    first.write_bytes(bytes(data))
    assert open_manifest([str(copy)]).identity != manifest.identity


def test_a_file_that_ends_early_is_noticed_when_it_is_read(case, tmp_path):
    manifest, _ = case
    copy = tmp_path / "copy"
    shutil.copytree(manifest.folder, copy)
    there = open_manifest([str(copy)])
    last = copy / there.files[-1].name
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.raises(ManifestError, match=last.name):
        list(stream(there).rows(Range(1300, ROWS)))


@pytest.mark.parametrize("name", ["photos", *WRITERS])
def test_a_run_and_its_resume(name, tmp_path):
    """A first look, then the rest; a change of the manifest refuses the next start."""
    rows = 150
    folder = tmp_path / "photos"
    (folder / "pictures").mkdir(parents=True)
    for n in range(rows):
        (folder / "pictures" / f"{n}.png").write_bytes(picture(n % 30 + 1))
    manifest = folder
    if name != "photos":
        manifest = folder / name
        WRITERS[name](manifest, range(rows))
    options = [manifest, "-t", "caption", *echo(), "-o", tmp_path / "out", "--json"]
    first = vlmbatch("run", *options, "--limit=40", "--checkpoint-rows=16")
    assert first.exit_code == 0, first
    assert first.json["ok"] == 40
    second = vlmbatch("run", *options, "--checkpoint-rows=16")
    assert (second.exit_code, second.json["ok"], second.json["skipped"]) == (0, 110, 40), second
    table = read_results(tmp_path / "out")
    assert table["row"].to_pylist() == list(range(rows))
    if name == "photos":
        expected = sorted(f"pictures/{n}" for n in range(rows))
    elif name == "a.tar":
        expected = [row["id"] for row in formats.read_tar(manifest)]
    else:
        expected = [formats.record(n)["id"] for n in range(rows)]
    assert table["id"].to_pylist() == expected
    assert run_json(tmp_path / "out")["manifest"]["files"][0]["rows"] == rows
    assert set(table["status"].to_pylist()) == {"ok"}
    if name == "photos":
        (folder / "pictures" / "0.png").write_bytes(picture(64))
    else:
        WRITERS[name](manifest, range(rows - 1))
    third = vlmbatch("run", *options)
    assert third.exit_code == 2, third
    assert "\n  manifest: " in third.stderr
