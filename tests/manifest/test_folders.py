"""What folders and globs stand for: images, tables beside images, partitions, the Hub's layout."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness import echo, picture, read_results, run_json, vlmbatch
from tests.manifest import formats
from tests.manifest.formats import rows_of
from vlmbatch.errors import ManifestError, VlmbatchError
from vlmbatch.manifest import Manifest, images, open_manifest


def touch(folder, *names: str, data: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def names(*paths, **filters) -> list[str]:
    return [file.name for file in open_manifest([str(p) for p in paths], **filters).files]


def refused(*paths, **filters) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        open_manifest([str(p) for p in paths], **filters)
    return caught.value


def pictures(*paths, **filters) -> list[str]:
    manifest = open_manifest([str(p) for p in paths], **filters)
    assert {file.format for file in manifest.files} == {"images"}
    return [name for file in manifest.files for name in images.names_of(file)]


# images


def test_a_folder_of_images_is_a_row_for_each(tmp_path):
    kept = ["10.PNG", "9.jpg", "_DSC1.jpeg", "a/b c.webp", "a/ü.tiff", "z.gif"]
    touch(
        tmp_path, *kept, ".hidden.jpg", ".git/x.png", "__MACOSX/._a.jpg", "note.txt", "a/Thumbs.db"
    )
    assert pictures(tmp_path) == sorted(kept)
    rows = rows_of(tmp_path)
    assert [row.images[0].uri for row in rows] == sorted(kept)
    assert [row.id for row in rows] == [name.rpartition(".")[0] for name in sorted(kept)]


def test_filters_are_by_name_or_by_path(tmp_path):
    touch(tmp_path, "a.jpg", "b.png", "x/a.jpg", "x/y/b.jpg")
    assert pictures(tmp_path, include=["*.jpg"]) == ["a.jpg", "x/a.jpg", "x/y/b.jpg"]
    assert pictures(tmp_path, include=["x/*"]) == ["x/a.jpg", "x/y/b.jpg"]
    assert pictures(tmp_path, exclude=["a.*", "*.png"]) == ["x/y/b.jpg"]
    assert pictures(tmp_path / "*" / "*.jpg") == ["x/a.jpg"]
    assert "--include and --exclude" in refused(tmp_path, include=["*.bmp"]).message


def test_filters_of_a_run_are_part_of_its_listing(tmp_path):
    touch(tmp_path / "photos", "a.png", "b.png", "c.jpg", data=picture())
    options = [tmp_path / "photos", "-t", "caption", *echo(), "-o", tmp_path / "out"]
    first = vlmbatch("run", *options, "--include", "*.png")
    assert first.exit_code == 0, first
    assert "2 images, 0 answered" in first.stderr
    assert read_results(tmp_path / "out")["image"].to_pylist() == ["a.png", "b.png"]
    touch(tmp_path / "photos", "d.png", data=picture())  # not part of the listing
    assert vlmbatch("run", *options, "--include", "*.png").exit_code == 0
    assert read_results(tmp_path / "out").num_rows == 2
    other = vlmbatch("run", *options)
    assert other.exit_code == 2, other
    (tmp_path / "photos" / "a.png").unlink()
    gone = vlmbatch("run", *options, "--include", "*.png")
    assert gone.exit_code == 2
    assert "images of this run are gone: a.png" in gone.stderr


def test_a_listing_of_many_images_is_kept_in_pieces(tmp_path):
    sizes = {f"folder {n // 1000}/picture {n:06d}.jpg": n for n in range(40_000)}
    pieces = images.listed(sizes)
    assert [piece.rows for piece in pieces] == [16_384, 16_384, 7_232]
    assert [name for piece in pieces for name in images.names_of(piece)] == sorted(sizes)
    assert sum(len(piece.listing) for piece in pieces) < 10 * len(sizes)
    other = images.listed({**sizes, "folder 0/picture 000000.jpg": 7})
    assert [a == b for a, b in zip(pieces, other, strict=True)] == [False, True, True]
    manifest = Manifest(str(tmp_path), tuple(pieces), images.SCHEMA)
    assert len(list(manifest.boundaries())) == 40


# folders of several things


def test_tables_are_the_manifest_of_a_folder_whatever_is_beside_them(tmp_path):
    touch(tmp_path, "a.png", "b/c.png")
    formats.write_tar(tmp_path / "x.tar", range(3))
    manifest = open_manifest([str(tmp_path)])
    assert [file.name for file in manifest.files] == ["x.tar"]
    formats.write_csv(tmp_path / "rows.csv", range(3))
    manifest = open_manifest([str(tmp_path)])
    assert [file.name for file in manifest.files] == ["rows.csv"]
    assert "its 1 CSV file is the manifest; 3 images or tars" in manifest.notes[0]
    formats.write_jsonl(tmp_path / "rows.jsonl", range(3))
    error = refused(tmp_path)
    assert "several kinds: 1 CSV (.csv, .tsv), 1 JSONL (.jsonl, .ndjson)" in error.message
    assert names(tmp_path, include=["*.jsonl"]) == ["rows.jsonl"]
    error = refused(tmp_path / "rows.csv", tmp_path / "rows.jsonl")
    assert "several kinds" in error.message
    assert "several kinds" in refused(tmp_path / "rows.csv", tmp_path / "a.png").message


def test_a_file_of_no_known_kind_is_refused_with_what_is_known(tmp_path):
    touch(tmp_path, "a.xlsx", "empty.bin", data=b"")
    touch(tmp_path, "a.xlsx", data=b"PK\3\4" + bytes(2000))
    error = refused(tmp_path / "a.xlsx")
    assert "of no kind that is known" in error.message
    for known in ("Parquet", "JSONL", "CSV", "WebDataset", "images"):
        assert known in str(error.hint)
    assert "it is empty" in refused(tmp_path / "empty.bin").message
    assert "no manifest and no image" in refused(tmp_path).message
    formats.write_parquet(tmp_path / "part-0", range(3))  # as Spark names them, without an ending
    assert len(rows_of(tmp_path / "part-0")) == 3
    assert len(rows_of(tmp_path / "part-*")) == 3
    formats.write_tar(tmp_path / "shard", range(3))
    assert open_manifest([str(tmp_path / "shard")]).files[0].format == "webdataset"


def test_braces_stand_for_several_files(tmp_path):
    for name in ("000", "001", "010", "a", "{b,c}"):
        formats.write_tar(tmp_path / f"{name}.tar", range(2))
    assert names(tmp_path / "{000..001}.tar") == ["000.tar", "001.tar"]
    assert names(tmp_path / "{a,010}.tar") == ["010.tar", "a.tar"]
    assert names(tmp_path / "{b,c}.tar") == ["{b,c}.tar"]
    assert "no manifest" in refused(tmp_path / "{000..002}.tar").message
    assert "1 is after 0" in refused(tmp_path / "{1..0}.tar").message


# partitions


def test_partition_columns_are_fields(tmp_path):
    for year, place in ((2023, "Ulm"), (2024, "a%2Fb"), (2024, "__HIVE_DEFAULT_PARTITION__")):
        folder = tmp_path / f"year={year}" / f"place={place}"
        folder.mkdir(parents=True)
        formats.write_parquet(folder / "part-0.parquet", range(2))
    rows = rows_of(tmp_path, wanted=["year", "place"])
    assert [(row.fields["year"], row.fields["place"]) for row in rows] == [
        *[("2023", "Ulm")] * 2,
        *[("2024", None)] * 2,
        *[("2024", "a/b")] * 2,
    ]
    assert rows == rows_of(tmp_path / "*" / "*" / "*.parquet", wanted=["year", "place"])
    ended = vlmbatch(
        *("run", tmp_path, "-t", "caption", "--carry=year", "--limit=1", "-o", tmp_path / "out"),
        *echo(),
        "--max-failure-rate=1",
    )
    assert ended.exit_code == 0, ended
    assert read_results(tmp_path / "out")["year"].to_pylist() == ["2023"]


def test_folders_with_other_partition_columns_are_refused(tmp_path):
    for folder in ("year=1", "month=1"):
        (tmp_path / folder).mkdir()
        formats.write_parquet(tmp_path / folder / "a.parquet", range(2))
    assert "has other columns than" in refused(tmp_path).message


# files that were written apart


def test_columns_without_values_and_narrow_numbers_agree_with_other_files(tmp_path):
    kinds = [
        {"note": pa.null(), "n": pa.int32(), "tags": pa.list_(pa.null()), "w": pa.float32()},
        {"note": pa.string(), "n": pa.int64(), "tags": pa.list_(pa.string()), "w": pa.float64()},
        {"note": pa.large_string(), "n": pa.int8(), "tags": pa.null(), "w": pa.null()},
    ]
    values = {"note": ["a", "b", "c"], "n": [1, 2**40, 3], "tags": [[], ["x"], None]}
    values["w"] = [0.5, 0.1, None]
    for at, columns in enumerate(kinds):
        table = {"image": [f"{at}.png"], "id": [str(at)]}
        for name, kind in columns.items():
            value = None if pa.types.is_null(kind) else values[name][at]
            table[name] = pa.array([value], kind)
        pq.write_table(pa.table(table), tmp_path / f"{at}.parquet")
    ended = vlmbatch(
        *("run", tmp_path, "-t", "caption", "--carry=*", "-o", tmp_path / "out"),
        *(*echo(), "--max-failure-rate=1"),
    )
    assert ended.exit_code == 0, ended
    found = read_results(tmp_path / "out")
    assert found["note"].to_pylist() == [None, "b", "c"]
    assert found["n"].to_pylist() == [1, 2**40, 3]
    assert found["tags"].to_pylist() == [[], ["x"], None]
    assert found["w"].to_pylist() == [0.5, 0.1, None]


@pytest.mark.parametrize("kinds", [(pa.int64(), pa.float64()), (pa.string(), pa.binary())])
def test_types_that_nothing_holds_together_are_refused(tmp_path, kinds):
    for kind in kinds:
        table = pa.table({"image": ["a.png"], "x": pa.array([None], kind)})
        pq.write_table(table, tmp_path / f"{kind}.parquet")
    assert all(f"x: {kind}" in refused(tmp_path).message for kind in kinds)


# the Hub's layout


def dataset(folder, readme: str, *files: str):
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = [{"bytes": picture(), "path": "a.png"}] * 3
        pq.write_table(pa.table({"image": data, "label": [name] * 3}), folder / name)
    (folder / "README.md").write_text(readme)
    (folder / "dataset_infos.json").write_text("{}")
    return folder


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test-*]
- config_name: raw
  data_files: raw/*.parquet
---
# A dataset
"""


def test_the_default_configuration_of_a_dataset_card_is_read(tmp_path):
    files = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    files += ["data/test-00000-of-00001.parquet", "raw/x.parquet"]
    folder = dataset(tmp_path / "set", CARD, *files)
    manifest = open_manifest([str(folder)])
    assert [file.name for file in manifest.files] == sorted(files[:3])
    assert "configuration 'default', that is data/train-*, data/test-*" in manifest.notes[0]
    assert names(folder / "raw") == ["x.parquet"]
    assert names(folder / "data" / "train-*") == [name[5:] for name in files[:2]]
    plain = dataset(tmp_path / "plain", "# no card", *files)
    assert len(names(plain)) == 4
    below = "---\nconfigs:\n- config_name: raw\n  data_dir: raw\n---\n"
    assert names(dataset(tmp_path / "below", below, *files)) == ["raw/x.parquet"]
    several = CARD.replace("config_name: default", "config_name: other")
    error = refused(dataset(tmp_path / "several", several, *files))
    assert "several configurations, and none as the default" in error.message
    assert "raw: raw/*.parquet" in error.message
    ended = vlmbatch("run", folder, "-t", "caption", *echo(), "-o", tmp_path / "out")
    assert ended.exit_code == 0, ended
    assert read_results(tmp_path / "out").num_rows == 9
    assert "schema" in run_json(tmp_path / "out")["manifest"]


def test_a_path_that_looks_like_a_name_of_the_hub_is_a_path_where_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("owner/name")
    formats.write_csv(tmp_path / "owner" / "name" / "a.csv", range(2))
    assert names("owner/name") == ["a.csv"]
    with pytest.raises(VlmbatchError, match="no manifest owner/nome: there is no such file"):
        open_manifest(["owner/nome"])
