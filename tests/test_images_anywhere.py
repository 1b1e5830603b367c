"""Whole runs over images that lie elsewhere: web servers, private hosts, allowed folders."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.harness import echo, picture, read_results, vlmbatch, write_manifest


class Site(BaseHTTPRequestHandler):
    """Pictures for every path but a few."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        status, kind, body = 200, "image/png", picture(30, 20)
        match path:
            case "/gone.png":
                status, kind, body = 404, "text/html", b"<html>not here</html>"
            case "/page.png":
                kind, body = "text/html", b"<!DOCTYPE html><html>Please log in</html>"
            case "/moved.png":
                status, body = 301, b""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 301:
            self.send_header("Location", "/a.png")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(manifest: Path, output: Path, *options: str | Path):
    words = ["-t", "caption", "-o", output, "--max-failure-rate=1", "--json", *echo()]
    return vlmbatch("run", manifest, *words, *options)


def test_a_run_over_urls(tmp_path: Path, site: str) -> None:
    paths = ["a.png?sig=secret", "b.png", "moved.png", "gone.png?sig=secret", "page.png"]
    manifest = write_manifest(
        tmp_path / "m.parquet", {"image": [f"{site}/{path}" for path in paths]}
    )
    refused = run(manifest, tmp_path / "refused")
    assert refused.exit_code == 0, refused
    assert refused.json["failures"] == {"image_forbidden": 5}

    ended = run(manifest, tmp_path / "out", "--allow-private-hosts")
    assert ended.exit_code == 0, ended
    assert ended.json["failures"] == {"image_missing": 1, "image_unreadable": 1}
    found = read_results(tmp_path / "out").to_pylist()
    assert [row["image_width"] for row in found] == [30, 30, 30, None, None]
    assert found[0]["image"] == f"{site}/a.png"
    assert "an HTML page, not an image" in found[4]["error"]["message"]
    for file in tmp_path.rglob("*"):
        if file.is_file() and file != manifest:
            assert b"secret" not in file.read_bytes(), file


def test_allowed_folders_are_relative_to_where_the_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture())
    manifest = write_manifest(tmp_path / "m.parquet", {"image": ["inside/a.png", "outside/a.png"]})
    monkeypatch.chdir(tmp_path)
    ended = run(manifest, tmp_path / "out", "--allow-root", "inside")
    assert ended.exit_code == 0, ended
    assert ended.json["failures"] == {"image_forbidden": 1}
    ended = run(manifest, tmp_path / "both", "--allow-root", "inside", "--allow-root", "outside")
    assert ended.json["failures"] == {}


def test_pages_of_one_document_are_rows_with_ids_of_their_own(tmp_path: Path) -> None:
    from PIL import Image

    pages = [Image.new("RGB", (20 + n, 10)) for n in range(3)]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    names = [f"scan.tif#page={number}" for number in (1, 2, 3, 4)]
    uris = [f"file://{tmp_path}/{name}" for name in names]
    manifest = write_manifest(tmp_path / "m.parquet", {"image": names + uris})
    ended = run(manifest, tmp_path / "out")
    assert ended.json["failures"] == {"image_missing": 2}
    found = read_results(tmp_path / "out").to_pylist()
    assert [row["image_width"] for row in found] == [20, 21, 22, None] * 2
    assert [row["image"] for row in found] == names + uris
    assert len({row["id"] for row in found}) == 8
