"""A web server on loopback with a folder's files by ranges, which also answers as the Hub's API
does for one dataset. Run by itself: ``python -m tests.manifest.web FOLDER`` prints its port."""

from __future__ import annotations

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40
NAME = "owner/photos"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """Information about paths, as HfApi.get_paths_info asks for it."""
        length = int(self.headers["Content-Length"])
        asked = self.rfile.read(length).decode()
        try:
            names = json.loads(asked)["paths"]
        except ValueError:
            names = re.findall(r"paths=([^&]*)", asked)
        entries = self._entries("")
        wanted = [unquote(name) for name in ([names] if isinstance(names, str) else names)]
        self._json([each for each in entries if each["path"] in wanted])

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/datasets/"):
            return self._api(path.removeprefix("/api/datasets/"))
        match = re.fullmatch(rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", path)
        if match and match[1] != COMMIT:
            return self._send(404, b"")
        name = match[2] if match else path.removeprefix("/")
        file = self.folder / name
        if "forbidden" in name:
            return self._send(403, b"")
        if not file.is_file():
            return self._send(404, b"")
        data = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None or "without-ranges" in name:
            return self._send(200, data, {"Accept-Ranges": "bytes"})
        first, last = int(found[1]), min(int(found[2]), len(data) - 1)
        place = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return self._send(206, data[first : last + 1], place)

    def _api(self, path: str) -> None:
        if not re.match(rf"{NAME}(/|$)", path):
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        rest = path.removeprefix(NAME).strip("/")
        if rest in ("", "revision/main", f"revision/{COMMIT}"):
            return self._json({"id": NAME, "sha": COMMIT, "siblings": [], "private": False})
        match = re.fullmatch(rf"tree/(?:main|{COMMIT})/?(.*)", rest)
        if match is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        below = "recursive=True" in self.path or "recursive=true" in self.path
        prefix = f"{match[1]}/" if match[1] else ""
        entries = [
            each
            for each in self._entries(prefix)
            if below or "/" not in each["path"][len(prefix) :]
        ]
        return (
            self._json(entries)
            if entries
            else self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        )

    def _entries(self, prefix: str) -> list[dict]:
        found = []
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            if name.startswith(prefix):
                kind = "directory" if file.is_dir() else "file"
                size = 0 if file.is_dir() else file.stat().st_size
                found.append({"type": kind, "path": name, "size": size, "oid": "2" * 40})
        return found

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        print(self.command, self.path, self.headers.get("Range", ""), file=sys.stderr, flush=True)


def main() -> None:
    Handler.folder = Path(sys.argv[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
