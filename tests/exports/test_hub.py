"""An upload to the Hub: its own client, and a server on loopback that takes commits as it does."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.exports import outputs
from tests.exports.outputs import GONE, ROWS, answered, colour_of

REPO = "me/pictures"


class FakeHub:
    """Keeps what is committed in ``folder``; ``refuses`` makes it answer every commit with 500."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.created: list[dict[str, Any]] = []
        self.refuses = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, value = hub.answer(self.path.partition("?")[0], body)
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        match path:
            case "/api/repos/create":
                self.created.append(json.loads(body))
                return 200, {"url": f"{self.address}/datasets/{REPO}", "name": REPO}
            case "/api/validate-yaml":
                return 200, {"errors": [], "warnings": []}
            case _ if path == f"/api/datasets/{REPO}/preupload/main":
                files = json.loads(body)["files"]
                regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                return 200, {"files": [{"path": file["path"], **regular} for file in files]}
            case _ if path == f"/api/datasets/{REPO}/commit/main" and self.refuses:
                return 403, {"error": "you may not write here"}
            case _ if path == f"/api/datasets/{REPO}/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        file = self.folder / line["value"]["path"]
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(base64.b64decode(line["value"]["content"]))
                url = f"{self.address}/datasets/{REPO}/commit/{'1' * 40}"
                return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": url}
        return 404, {"error": path}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    server = FakeHub(tmp_path / "hub")
    yield server
    server.close()


def test_a_data_set_with_its_card_is_uploaded(hub: FakeHub, tmp_path: Path) -> None:
    import datasets

    output = answered(outputs.paths(tmp_path / "data"), tmp_path / "out")
    command = [
        *(sys.executable, "-m", "vlmbatch", "export", str(output), str(tmp_path / "made")),
        *("--to", "hub", "--format-arg", f"repo={REPO}", "--format-arg", "license=cc-by-4.0"),
        *("--split", "train=0.5,val=0.5", "--where", "task = 'caption'"),
        *("--min-chars", "3", "--drop", "refusals"),
    ]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
    }
    hub.refuses = True
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"cannot upload to {REPO} on the Hub: " in done.stderr
    assert "run the same again" in done.stderr
    assert "hf_secret" not in done.stderr
    hub.refuses = False
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 pieces were there already" in done.stdout
    assert hub.created[0]["name"] == "pictures"
    assert "private" in (hub.created[0].get("visibility"), *hub.created[0])

    names = {path.relative_to(hub.folder).parts[0] for path in hub.folder.rglob("*")}
    assert names == {"README.md", "data"}
    head, _, card = (hub.folder / "README.md").read_text()[4:].partition("---\n")
    about = yaml.safe_load(head)
    assert about["license"] == "cc-by-4.0"
    assert "synthetic" in about["tags"]
    assert "| model | `echo` |" in card
    assert "| caption | Describe this image in one short sentence. |" in card
    assert "| an answer; `task = 'caption'`; 3 characters or more; no refusals |" in card
    assert "`manifest.parquet`" in card
    assert str(tmp_path) not in card
    loaded = datasets.load_dataset(str(hub.folder), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) <= {"train", "validation", "val"}
    rows = [row for split in loaded.values() for row in split]
    found = {row["id"]: colour_of(row["images"][0]) for row in rows}
    assert found == {f"id-{i}": outputs.COLOURS[i] for i in range(ROWS) if i != GONE}
