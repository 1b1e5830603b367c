"""Google's and Azure's stores, by emulators, through the command: manifests, images and outputs.

What each store is asked for is the same, and so are the tests; what only one of them has (an
account in the address) stands at the end.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import clouds
from tests.clouds import Cloud
from tests.harness import (
    OURS,
    Command,
    Finished,
    KillPoint,
    Kind,
    assert_adds_up,
    assert_whole,
    echo,
    picture,
    read_results,
    run_command,
    until,
    write_manifest,
)
from tests.s3 import S3Endpoint
from tests.s3_faults import Error, FaultProxy, LostAnswer, by_chance, never, one_of, where
from tests.servers import free_ports
from tests.store_runs import Pictures, StoreRun, kill_and_finish

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default"),  # those of the libraries, in this process
]
ROWS = 120
ODD = ("a b.png", "é #1.png", "100%.png", "a+b&c=d.png", "50%20.png", "what?.png", "[x]{y}.png")


@pytest.fixture(scope="module", params=["google", "azure"])
def cloud(request: pytest.FixtureRequest) -> Iterator[Cloud]:
    server: Cloud = request.getfixturevalue(f"{request.param}_server")
    with server.in_environment():
        yield server


@pytest.fixture(scope="module")
def pictures(cloud: Cloud) -> Pictures:
    return Pictures.made(cloud, ROWS)


@pytest.fixture
def bucket(cloud: Cloud) -> Bucket:
    return Bucket(cloud, cloud.new_bucket())


@dataclass(frozen=True)
class Bucket:
    """A new one on the server."""

    server: Cloud
    name: str

    @property
    def root(self) -> str:
        return f"{self.server.scheme}://{self.name}"

    def put(self, name: str, data: bytes) -> str:
        self.server.fs().pipe_file(f"{self.name}/{name}", data)
        return f"{self.root}/{name}"

    def put_manifest(self, name: str, images: list[str], folder: Path) -> str:
        path = write_manifest(folder / "manifest.parquet", {"image": images})
        return self.put(name, path.read_bytes())

    def proxied(self, rule: Any) -> FaultProxy:
        return FaultProxy(S3Endpoint(self.server.port), rule)


def caption(*words: str | Path) -> Finished:
    """The command in a process of its own, whatever its failed rows."""
    ended = run_command(
        *("run", *words, "-t", "caption", *echo(), "--max-failure-rate=1", "--json"), seconds=120
    )
    assert "Traceback" not in ended.stderr, ended
    return ended


def codes(output: Path) -> dict[str, str | None]:
    """Of each image: why it failed."""
    rows = read_results(output).to_pylist()
    return {row["image"]: row["error"] and row["error"]["code"] for row in rows}


# manifests


def test_manifests_are_read_where_they_lie(bucket: Bucket, tmp_path: Path) -> None:
    lines = [json.dumps({"image": "../pictures/a.png", "id": f"i{n}"}) for n in range(30)]
    bucket.put("pictures/a.png", picture())
    bucket.put("lines/m.jsonl.gz", gzip.compress("\n".join(lines).encode()))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for number in range(20):
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = len(picture())
            archive.addfile(member, io.BytesIO(picture()))
    bucket.put("shards/000.tar", tar.getvalue())
    bucket.put_manifest("tables/year=2024/m.parquet", ["../pictures/a.png"] * 40, tmp_path)
    for number, (place, rows) in enumerate(
        [("lines/m.jsonl.gz", 30), ("shards/*.tar", 20), ("tables", 40), ("pictures", 1)]
    ):
        output = tmp_path / f"out{number}"
        ended = caption(f"{bucket.root}/{place}", "-o", output)
        assert (ended.exit_code, ended.json["ok"]) == (0, rows), ended
        again = caption(f"{bucket.root}/{place}", "-o", output)
        assert (again.exit_code, again.json["skipped"]) == (0, rows), again


@pytest.mark.parametrize("place", ["none.parquet", "none/*.parquet", "none/"])
def test_a_manifest_that_is_not_there(bucket: Bucket, place: str) -> None:
    bucket.put("x.parquet", b"")
    ended = caption(f"{bucket.root}/{place}", "-o", "out")
    assert ended.exit_code == 2, ended
    assert f"{bucket.root}/none" in ended.stderr


# images


def test_each_image_is_read_or_its_row_says_why_not(bucket: Bucket, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("in/a.png", picture())
    bucket.put("photos.zip", packed.getvalue())
    bucket.put("empty.png", b"")
    bucket.put("broken.png", b"no picture")
    for name in ODD:
        bucket.put(f"odd/{name}", picture())
    wanted: dict[str, str | None] = {
        **{f"{bucket.root}/odd/{name}": None for name in ODD if "?" not in name},
        f"odd/{ODD[1]}": None,
        f"zip://in/a.png::{bucket.root}/photos.zip": None,
        f"zip://in/b.png::{bucket.root}/photos.zip": "image_missing",
        f"{bucket.root}/gone.png": "image_missing",
        f"{bucket.server.scheme}://no-such-bucket/gone.png": "image_missing",
        f"{bucket.root}/empty.png": "image_unreadable",
        f"{bucket.root}/broken.png": "image_unreadable",
        f"{bucket.root}/forbidden.png": "image_forbidden",
    }
    manifest = bucket.put_manifest("m.parquet", list(wanted), tmp_path)
    denied = where(lambda _: Error(403, "AuthorizationPermissionMismatch"), key="forbidden.png")
    with bucket.proxied(denied) as proxy, bucket.server.in_environment(proxy.port):
        ended = caption(manifest, "-o", tmp_path / "out")
    assert ended.exit_code == 0, ended
    assert codes(tmp_path / "out") == wanted
    assert_adds_up(ended.json)


def test_an_image_is_one_request(bucket: Bucket, tmp_path: Path) -> None:
    names = [f"many/{number}.png" for number in range(40)]
    for name in names:
        bucket.put(name, picture())
    manifest = write_manifest(
        tmp_path / "m.parquet", {"image": [f"{bucket.root}/{name}" for name in names]}
    )
    with bucket.proxied(never) as proxy, bucket.server.in_environment(proxy.port):
        ended = caption(manifest, "-o", tmp_path / "out")
    assert ended.json["ok"] == 40, ended
    assert len(proxy.log) == 40


def test_what_passes_costs_no_row(bucket: Bucket, tmp_path: Path) -> None:
    names = [f"many/{number}.png" for number in range(40)]
    for name in names:
        bucket.put(name, picture())
    images = [f"{bucket.root}/{name}" for name in names]
    manifest = write_manifest(tmp_path / "m.parquet", {"image": images})
    rule = by_chance(0.1, Error(503, "ServerBusy"), LostAnswer(), seed=3)
    with bucket.proxied(rule) as proxy, bucket.server.in_environment(proxy.port):
        ended = caption(manifest, "-o", tmp_path / "out")
    assert ended.json["ok"] == 40, ended
    assert sum(proxy.injected.values()) > 2


# outputs


@pytest.mark.parametrize("kind", ["group", "worker"])
def test_nothing_is_lost_or_doubled_when_killed(
    pictures: Pictures, kind: Kind, tmp_path: Path
) -> None:
    run = StoreRun(tmp_path, pictures, ROWS)
    kill_and_finish(run, kind, count=2 if kind == "worker" else 1, seed=11)


def test_a_second_run_is_refused_while_status_says_how_it_goes(
    pictures: Pictures, tmp_path: Path
) -> None:
    run = StoreRun(tmp_path, pictures, ROWS)
    with run.start(hang_after=40) as first:
        until(lambda: len(run.log) == 40, "answers")
        status = run_command("status", run.place, "--json")
        assert status.json["state"] == "running", status
        second = run_command("run", *run._options)
        assert second.exit_code == 1, second
        assert f"another run holds {run.place} (pid {first.pid} on " in second.stderr
        first.signal(signal.SIGINT)
        first.read_until("stopping")
        run.go_on.touch()
        assert first.wait().exit_code == 130
    assert run_command("status", run.place, "--json").json["state"] == "interrupted"
    run.assert_done(run.finish())


def test_of_two_runs_that_start_together_one_works(pictures: Pictures, tmp_path: Path) -> None:
    run = StoreRun(tmp_path, pictures, ROWS)
    run._starts.append((0, set()))
    with Command("run", *run._options) as one, Command("run", *run._options) as other:
        ended = [one.wait(), other.wait()]
    assert sorted(each.exit_code for each in ended) == [0, 1], list(map(str, ended))
    assert not run.log.rows_twice()
    run.assert_done(next(each for each in ended if each.exit_code == 0))


def test_a_lease_that_expired_is_taken_over(pictures: Pictures, tmp_path: Path) -> None:
    """As left by a machine that is gone: its note is made old, for nobody waits for a minute."""
    run = StoreRun(tmp_path, pictures, ROWS)
    run.kill(KillPoint("group", 40, 16, 1))
    lock = f"{run.prefix}/{OURS}/lock"
    note = {**json.loads(run.server.fs().cat_file(lock)), "host": "gone", "process": None}
    run.server.fs().pipe_file(lock, json.dumps({**note, "seconds": 600}).encode())
    refused = run_command("run", *run._options)
    assert refused.exit_code == 1, refused
    assert "its lease ends in" in refused.stderr
    run.server.fs().pipe_file(lock, json.dumps({**note, "seconds": -1}).encode())
    run.assert_done(run.finish())


def test_lost_acknowledgements_double_nothing(bucket: Bucket, tmp_path: Path) -> None:
    run = StoreRun(tmp_path, Pictures.made(bucket.server, 60), 60)
    uploads = one_of(
        where(by_chance(0.5, LostAnswer(), seed=5), operation="PUT"),
        where(by_chance(0.5, LostAnswer(), seed=6), operation="POST"),
    )
    with bucket.proxied(uploads) as proxy, bucket.server.in_environment(proxy.port):
        ended = run.finish()
    assert proxy.injected[LostAnswer()]  # of some ten uploads
    run.assert_done(ended)
    assert not run.log.rows_twice()


def test_retry_overwrite_and_what_others_read(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a.png", picture())
    manifest = bucket.put_manifest("m.parquet", ["a.png"] * 20 + ["late.png"], tmp_path)
    output = f"{bucket.root}/some runs/out"
    ended = caption(manifest, "-o", output)
    assert (ended.exit_code, ended.json["failed"]) == (0, 1), ended
    bucket.put("late.png", picture())
    retried = run_command("retry", output, "--json")
    assert (retried.exit_code, retried.json["ok"]) == (0, 1), retried
    status = run_command("status", output, "--json").json
    assert (status["state"], status["done"], status["failures"]) == ("finished", 21, {})
    fs, place = bucket.server.fs(), f"{bucket.name}/some runs/out"
    (part,) = fs.glob(f"{place}/part-*.parquet")
    assert pq.read_table(part, filesystem=fs)["row"].to_pylist() == list(range(21))
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DATASETS, f"{output}/part-*.parquet"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},
    )
    assert told.stdout.splitlines()[-1:] == [f"21 {['ok'] * 21}"], told.stderr
    again = caption(manifest, "-o", output, "--limit=5", "--overwrite")
    assert (again.exit_code, again.json["ok"]) == (0, 5), again
    assert pq.read_table(part, filesystem=fs)["row"].to_pylist() == list(range(5))
    bucket.put("other/thesis.docx", b"years of work")
    refused = caption(manifest, "-o", f"{bucket.root}/other")
    assert refused.exit_code == 2, refused
    assert "holds something else (thesis.docx)" in refused.stderr
    missing = caption(manifest, "-o", f"{bucket.server.scheme}://nobody-has-this/out")
    assert missing.exit_code == 2, missing
    assert "there is no bucket" in missing.stderr


DATASETS = """
import sys
import datasets
rows = datasets.load_dataset("parquet", data_files=sys.argv[1], split="train")
print(len(rows), rows["status"][:])
"""


# credentials

REFUSED = {
    "google": Error(401, "Anonymous caller does not have storage.objects.get access"),
    "azure": Error(403, "AuthenticationFailed"),
}


def test_credentials_that_expire_stop_the_run_and_renewed_ones_go_on(
    cloud: Cloud, pictures: Pictures, tmp_path: Path
) -> None:
    run = StoreRun(tmp_path, pictures, ROWS)
    expired = REFUSED[type(cloud).__name__.lower()]
    with FaultProxy(S3Endpoint(cloud.port)) as proxy, cloud.in_environment(proxy.port):
        with run.start(checkpoint_rows=8, hang_after=60) as command:
            until(lambda: run.shards(), "a commit")
            until(lambda: len(run.log) >= 60, "60 answers")
            proxy.rule = lambda _request: expired
            run.go_on.touch()
            stopped = command.wait(seconds=100)
        assert stopped.exit_code == 1, stopped
        assert "expired" in stopped.stderr, stopped
        assert "same command" in stopped.stderr, stopped
        assert "Traceback" not in stopped.stderr, stopped
        committed = run._committed()
        proxy.rule = never
        ended = run.finish()
    assert ended.json["skipped"] == len(committed) > 0
    assert_whole(run.fetch_output(), run.quiz.answers, ids=run.quiz.ids)


def test_whoever_has_no_credentials_is_told_soon(bucket: Bucket, tmp_path: Path) -> None:
    """For the manifest, an image, and the output; on a machine that is none of the cloud's."""
    manifest = bucket.put_manifest("m.parquet", ["a.png"] * 3, tmp_path)
    local = write_manifest(tmp_path / "local.parquet", {"image": [f"{bucket.root}/a.png"] * 3})
    plain = write_manifest(tmp_path / "plain.parquet", {"id": ["1", "2", "3"]})
    (closed,) = free_ports(1)
    nobody: dict[str, str | None] = {  # nothing answers where credentials are looked for
        "GCE_METADATA_HOST": f"127.0.0.1:{closed}",
        "GCE_METADATA_IP": f"127.0.0.1:{closed}",
        "AZURE_POD_IDENTITY_AUTHORITY_HOST": f"http://127.0.0.1:{closed}",
        "AZURE_STORAGE_CONNECTION_STRING": None,
        "AZURE_STORAGE_ACCOUNT_NAME": "somebody",
        "FSSPEC_GS": None,
        "HOME": str(tmp_path),
        "PATH": "/nowhere",
    }
    refused = REFUSED[type(bucket.server).__name__.lower()]
    with bucket.proxied(lambda _: refused) as proxy:
        with bucket.server.in_environment(proxy.port, **nobody):
            for number, words in enumerate(
                [(manifest,), (local,), (plain, "-o", f"{bucket.root}/out")]
            ):
                began = time.monotonic()
                ended = caption(*words, *(() if number == 2 else ("-o", tmp_path / str(number))))
                assert ended.exit_code == 1, ended
                assert "missing, wrong or expired" in ended.stderr, ended
                assert time.monotonic() - began < 60


def test_no_credentials_are_written(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"AccountKey": clouds.KEY, "BlobEndpoint": "connection string"}
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    bucket.put("a.png", picture())
    manifest = bucket.put_manifest("m.parquet", ["a.png"] * 9 + ["gone.png"], tmp_path)
    for output in (f"{bucket.root}/out", tmp_path / "out"):
        assert caption(manifest, "-o", output).json["ok"] == 9
    fs = bucket.server.fs()
    written = {path: fs.cat_file(path) for path in fs.find(f"{bucket.name}/out")}
    for folder in (tmp_path / "tmp", tmp_path / "out"):
        files = [path for path in folder.rglob("*") if path.is_file()]
        written.update((str(path), path.read_bytes()) for path in files)
    assert any("logs" in path for path in written)
    for path, data in written.items():
        for secret in (*secrets, clouds.KEY):
            assert secret.encode() not in data, path


# Azure alone


def test_an_account_in_the_address_is_kept(azure_server: Cloud, tmp_path: Path) -> None:
    """``abfs://container@account...`` as manifest, folder, image and output."""
    with azure_server.in_environment():
        bucket = Bucket(azure_server, azure_server.new_bucket())
        root = f"abfs://{bucket.name}@{clouds.ACCOUNT}.dfs.core.windows.net"
        bucket.put("data/a.png", picture())
        bucket.put_manifest("data/tables/m.parquet", ["../a.png"], tmp_path)
        bucket.put_manifest("data/more/m.parquet", [f"{root}/data/a.png"], tmp_path)
        for number, place in enumerate(
            ["data/tables/m.parquet", "data/tables", "data/more/*.parquet"]
        ):
            output = f"{root}/out{number}"
            ended = caption(f"{root}/{place}", "-o", output)
            assert (ended.exit_code, ended.json["ok"]) == (0, 1), ended
            assert ended.json["output"] == output
            again = caption(f"{root}/{place}", "-o", output)
            assert (again.exit_code, again.json["skipped"]) == (0, 1), again
        other = caption("abfs://c@other.dfs.core.windows.net/m.parquet", "-o", "out")
        assert other.exit_code == 2, other
        assert "is in the account other" in other.stderr


def test_settings_that_name_no_account_of_azure(azure_server: Cloud) -> None:
    for setting in (None, "nonsense"):
        with azure_server.in_environment(AZURE_STORAGE_CONNECTION_STRING=setting):
            ended = caption("az://container/m.parquet", "-o", "out")
        assert ended.exit_code == 1, ended
        assert "cannot tell how to reach az://container/m.parquet" in ended.stderr
        assert "AZURE_STORAGE_CONNECTION_STRING" in ended.stderr


def test_a_key_that_is_wrong(azure_server: Cloud) -> None:
    key = clouds.KEY.replace("Eby8", "Abc8")
    wrong = clouds.connection(azure_server.port, key)
    with azure_server.in_environment(AZURE_STORAGE_CONNECTION_STRING=wrong):
        ended = caption("az://ready/m.parquet", "-o", "out")
    assert ended.exit_code == 1, ended
    assert key not in ended.stderr
    assert os.environ.get("AZURE_STORAGE_CONNECTION_STRING") != wrong
