"""Manifests behind https: addresses and on the Hub: the real clients, and a server on loopback that
answers them."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.harness import PATIENCE
from tests.manifest import formats
from tests.manifest.formats import stream
from tests.manifest.web import COMMIT, NAME
from vlmbatch.errors import ManifestError, ManifestUnreachable
from vlmbatch.manifest import open_manifest
from vlmbatch.records import Range


@pytest.fixture
def web(tmp_path):
    """(a folder, its address)."""
    folder = tmp_path / "served"
    folder.mkdir()
    words = [sys.executable, "-m", "tests.manifest.web", str(folder)]
    with (tmp_path / "requests.log").open("wb") as log:
        server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
    with server:
        yield folder, f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.kill()


def test_every_format_is_read_by_ranges_over_http(web):
    folder, address = web
    formats.write_parquet(folder / "a.parquet", range(900))
    formats.write_jsonl(folder / "a.jsonl.gz.tmp", range(5))
    formats.zipped(formats.write_jsonl)(folder / "a.jsonl.gz", range(900))
    formats.write_csv(folder / "a.csv", range(900))
    formats.write_tar(folder / "a b.tar", range(100))
    for name in ("a.parquet", "a.jsonl.gz", "a.csv", "a b.tar"):
        here = open_manifest([str(folder / name)])
        there = open_manifest([f"{address}/{name}"])
        assert there.files == here.files
        assert there.folder == address
        for wanted in (Range(70, 100), Range(0, 3)):
            expected = list(stream(here, "note").rows(wanted))
            assert list(stream(there, "note").rows(wanted)) == expected
    braces = open_manifest([f"{address}/a.{{csv,csv}}"])
    assert braces.rows == 900


def test_what_a_web_server_refuses_is_said(web, tmp_path):
    folder, address = web
    formats.write_parquet(folder / "without-ranges.parquet", range(9000))
    formats.write_csv(folder / "forbidden.csv", range(9))
    with pytest.raises(ManifestError, match=r"none\.csv"):
        open_manifest([f"{address}/none.csv"])
    with pytest.raises(ManifestUnreachable, match="access is denied") as denied:
        open_manifest([f"{address}/forbidden.csv"])
    assert denied.value.exit_code == 1
    with pytest.raises(ManifestError, match="is read by ranges"):
        open_manifest([f"{address}/without-ranges.parquet"])


HUB = """
    import json, sys
    from tests.manifest.formats import stream
    from vlmbatch.errors import VlmbatchError
    from vlmbatch.manifest import open_manifest
    from vlmbatch.records import Range

    for name in sys.argv[1:]:
        try:
            manifest = open_manifest([name])
            rows = list(stream(manifest, "note").rows(Range(0, manifest.rows)))
            print(json.dumps([manifest.folder, [f.name for f in manifest.files], len(rows)]))
        except VlmbatchError as error:
            print(json.dumps([type(error).__name__, error.message]))
"""


def test_a_dataset_of_the_hub_is_read_at_its_commit(web, tmp_path):
    """huggingface_hub reads its settings when it is imported: hence another process."""
    pytest.importorskip("huggingface_hub")
    folder, address = web
    (folder / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        formats.write_parquet(folder / "data" / f"{name}.parquet", range(50))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/train-*\n---\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
    asked = [
        *(NAME, f"hf://datasets/{NAME}", f"hf://datasets/{NAME}@main/data"),
        *(f"hf://datasets/{NAME}/data/test-*.parquet", "owner/nothing"),
    ]
    words = [sys.executable, "-c", textwrap.dedent(HUB), *asked]
    run = subprocess.run(
        words, capture_output=True, text=True, env=environment, cwd=os.getcwd(), timeout=PATIENCE
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    pinned = f"hf://datasets/{NAME}@{COMMIT}"
    train = [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]
    assert found[0] == found[1] == [pinned, train, 100]
    assert found[2] == [
        f"{pinned}/data",
        ["test-00000-of-00001.parquet", *(name[5:] for name in train)],
        150,
    ]
    assert found[3] == [f"{pinned}/data", ["test-00000-of-00001.parquet"], 50]
    assert found[4][0] == "ManifestError"
    assert found[4][1].startswith("no manifest owner/nothing: there is no such file or folder here")
    assert "hf://datasets/owner/nothing" in found[4][1]
