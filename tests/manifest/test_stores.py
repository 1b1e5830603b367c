"""Manifests on a real S3 server: listed, planned and read by ranges; its refusals in our words."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness import echo, picture, read_results, run_json, vlmbatch
from tests.manifest import formats
from tests.manifest.formats import stream
from tests.s3_faults import (
    Error,
    FaultProxy,
    Reset,
    Short,
    Together,
    by_chance,
    from_request,
    never,
    where,
)
from vlmbatch.errors import ManifestError, ManifestUnreachable
from vlmbatch.manifest import Manifest, open_manifest
from vlmbatch.records import Range

ROWS = 2500
WRITERS = {
    "a.parquet": formats.write_parquet,
    "a.jsonl": formats.write_jsonl,
    "a.jsonl.gz": formats.zipped(formats.write_jsonl),
    "a.csv": formats.write_csv,
    "a.tsv.zst": formats.zipped(lambda path, rows: formats.write_csv(path, rows, "\t")),
    "a.tar": formats.write_tar,
}


@pytest.fixture
def bucket(rclone_server):
    """(a filesystem of the tests' own, the URI of a new bucket), with its server in the
    environment."""
    with rclone_server.in_environment():
        fs = rclone_server.fs()
        name = rclone_server.new_bucket()
        yield fs, f"s3://{name}"


@pytest.fixture
def proxied(rclone_server):
    """(a filesystem of the tests' own, the URI of a new bucket, what it is asked for by others)."""
    name = rclone_server.new_bucket()
    with FaultProxy(rclone_server) as proxy, proxy.in_environment():
        yield rclone_server.fs(), f"s3://{name}", proxy


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_is_the_same_on_s3_as_on_disk(name, bucket, tmp_path):
    fs, uri = bucket
    for stem, rows in (("a", range(1500)), ("b", range(1500, ROWS))):
        there = name.replace("a.", f"{stem}.", 1)
        WRITERS[name](tmp_path / there, rows)
        fs.put_file(str(tmp_path / there), f"{uri}/some folder/{there}")
    local, remote = open_manifest([str(tmp_path)]), open_manifest([f"{uri}/some folder"])
    assert remote.folder == f"{uri}/some folder"
    assert (remote.files, remote.identity) == (local.files, local.identity)
    assert Manifest.from_json(remote.to_json()) == remote
    here, far = stream(local, "note"), stream(remote, "note")
    for wanted in (Range(0, 40), Range(40, 90), Range(1400, 1600), Range(2499, 2500), Range(7, 9)):
        assert list(far.rows(wanted)) == list(here.rows(wanted))


def test_a_row_group_is_read_once_for_all_ranges_of_a_worker(proxied, tmp_path):
    """40 MB of images in one row group: the footer, then 8 MiB at a time, and nothing twice."""
    fs, uri, proxy = proxied
    path = tmp_path / "big.parquet"
    images = pa.array([bytes([n]) * 200_000 for n in range(200)], pa.binary())
    table = pa.table({"image": images, "unread": images, "n": list(range(200))})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_batch_size=16)
    assert pq.read_metadata(path).num_row_groups == 1
    fs.put_file(str(path), f"{uri}/big.parquet")
    manifest = open_manifest([f"{uri}/big.parquet"])
    assert proxy.operations["GET"] == 1  # the footer
    assert sum(proxy.sent.values()) <= 2**16
    proxy.log.clear()
    rows = stream(manifest, "n")
    found = [row for first in range(0, 200, 10) for row in rows.rows(Range(first, first + 10))]
    assert [row.fields["n"] for row in found] == list(range(200))
    assert [row.images[0].data for row in found] == images.to_pylist()
    assert max(proxy.sent.values()) <= 8 * 2**20
    assert sum(proxy.sent.values()) < 41 * 10**6, "the image column once, and little else"
    assert proxy.operations["GET"] == len(proxy.sent) < 15


def test_planning_asks_for_footers_alone(proxied, tmp_path):
    fs, uri, proxy = proxied
    for n in range(12):
        formats.write_parquet(tmp_path / f"{n}.parquet", range(50))
        fs.put_file(str(tmp_path / f"{n}.parquet"), f"{uri}/many/{n}.parquet")
    proxy.rule = where(lambda _: Together(2), operation="GET")  # a few footers at once
    assert open_manifest([f"{uri}/many/*.parquet"]).rows == 600
    assert proxy.operations["GET"] == 12
    assert proxy.most_in_flight > 1


@pytest.mark.parametrize(
    "fault", [Error(), Error(500, "InternalError"), Reset(), Short(5)], ids=str
)
def test_a_store_that_stumbles_costs_no_row(fault, proxied, tmp_path):
    fs, uri, proxy = proxied
    for name in ("a.parquet", "a.jsonl.gz"):
        WRITERS[name](tmp_path / name, range(900))
        fs.put_file(str(tmp_path / name), f"{uri}/{name}")
        proxy.rule = by_chance(0.3, fault, seed=len(name))
        rows = stream(open_manifest([f"{uri}/{name}"]), "note")
        found = [
            row for first in range(0, 900, 300) for row in rows.rows(Range(first, first + 300))
        ]
        proxy.rule = never
        assert found == list(
            stream(open_manifest([str(tmp_path / name)]), "note").rows(Range(0, 900))
        )
    assert proxy.injected[fault]


def test_credentials_that_expire_in_the_middle_stop_the_stream(proxied, tmp_path):
    fs, uri, proxy = proxied
    formats.write_tar(tmp_path / "a.tar", range(100))
    fs.put_file(str(tmp_path / "a.tar"), f"{uri}/a.tar")
    manifest = open_manifest([f"{uri}/a.tar"])
    proxy.rule = where(from_request(0, Error(400, "ExpiredToken")), operation="GET")
    with pytest.raises(ManifestUnreachable, match=r"at row 0: .*credentials .* expired"):
        list(stream(manifest).rows(Range(0, 100)))


def test_what_names_stand_for(bucket, tmp_path):
    fs, uri = bucket
    formats.write_jsonl(tmp_path / "a.jsonl", range(10))
    keys = [
        "year=2023/x.jsonl",
        "year=2024/x.jsonl",
        "_hidden/x.jsonl",
        "p/pic.jpg",
        "p/q/é #1.png",
    ]
    for key in keys:
        if key.endswith("jsonl"):
            fs.put_file(str(tmp_path / "a.jsonl"), f"{uri}/d/{key}")
        else:
            fs.pipe_file(f"{uri}/d/{key}", picture())
    manifest = open_manifest([f"{uri}/d/"])
    assert [file.name for file in manifest.files] == keys[:2]
    assert "2 images or tars beside them" in manifest.notes[0]
    manifest = open_manifest([f"{uri}/d/year={{2023..2024}}/x.jsonl"])
    assert manifest.rows == 20
    photos = open_manifest([f"{uri}/d/p"])
    assert [row.images[0].uri for row in stream(photos).rows(Range(0, 2))] == [
        "pic.jpg",
        "q/é #1.png",
    ]
    assert open_manifest(["-"], photos.to_json()) == photos
    fs.pipe_file(f"{uri}/d/p/a.png", picture())
    assert open_manifest(["-"], photos.to_json()).rows == 2
    assert open_manifest([f"{uri}/d/p"]).rows == 3
    assert open_manifest([f"{uri}/d/p"], exclude=["q/*"]).rows == 2
    with pytest.raises(ManifestError) as missing:
        open_manifest([f"{uri}/d/p/none.jsonl"])
    assert missing.value.hint == "there: a.png, pic.jpg"
    with pytest.raises(ManifestError, match="nothing matches"):
        open_manifest([f"{uri}/d/*.csv"])


def test_a_file_that_changed_is_noticed(bucket, tmp_path):
    fs, uri = bucket
    formats.write_parquet(tmp_path / "a.parquet", range(50))
    fs.put_file(str(tmp_path / "a.parquet"), f"{uri}/a.parquet")
    manifest = open_manifest([f"{uri}/a.parquet"])
    formats.write_parquet(tmp_path / "a.parquet", range(60))
    fs.put_file(str(tmp_path / "a.parquet"), f"{uri}/a.parquet")
    with pytest.raises(ManifestError, match=r"a\.parquet changed since"):
        list(stream(manifest).rows(Range(0, 50)))
    fs.rm_file(f"{uri}/a.parquet")
    with pytest.raises(ManifestError, match="nothing is there"):
        list(stream(manifest).rows(Range(0, 50)))


def test_credentials_that_are_refused_stop_the_run(bucket, tmp_path, monkeypatch):
    from tests.s3 import forget_connections

    fs, uri = bucket
    formats.write_csv(tmp_path / "a.csv", range(5))
    fs.put_file(str(tmp_path / "a.csv"), f"{uri}/a.csv")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    forget_connections()
    with pytest.raises(ManifestUnreachable, match=r"credentials|denied") as caught:
        open_manifest([f"{uri}/a.csv"])
    assert caught.value.exit_code == 1
    assert "another" not in str(caught.value)


def test_a_run_over_a_table_on_s3_with_its_images_inside(bucket, tmp_path):
    fs, uri = bucket
    formats.write_tar(tmp_path / "a.tar", range(60))
    fs.put_file(str(tmp_path / "a.tar"), f"{uri}/data/a.tar")
    options = [f"{uri}/data", "-t", "caption", *echo(), "-o", tmp_path / "out", "--json"]
    first = vlmbatch("run", *options, "--limit=20")
    assert first.exit_code == 0, first
    second = vlmbatch("run", *options, "--carry=txt")
    assert second.exit_code == 2, second
    second = vlmbatch("run", *options)
    assert second.json["ok"] == 40, second
    assert read_results(tmp_path / "out")["row"].to_pylist() == list(range(60))
    assert run_json(tmp_path / "out")["manifest"]["folder"] == f"{uri}/data"
