"""Uploads to an object store in one call, also on a condition: that nothing is there yet, or only
what this run has seen. Where another has come between, the store's library raises its word for 412.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

ONE_REQUEST_BYTES = 100 * 2**20
"""What s3fs uploads in one request is smaller; for more it has no place for a condition."""


def put_file(fs: Any, store: str | None, local: Path, path: str, replaces: str | None) -> None:
    """``replaces``: the tag of what may be there, empty for nothing; None for whatever it is."""
    whole = store == "azure" or local.stat().st_size < ONE_REQUEST_BYTES
    if not whole or store not in ("s3", "gcs", "azure"):
        replaces = None
    if store == "gcs" and replaces:
        _replace_on_gcs(fs, local.read_bytes(), path, replaces)
    else:
        fs.put_file(str(local), path, **_condition(store, replaces))


def pipe_file(fs: Any, store: str | None, data: bytes, path: str, replaces: str | None) -> None:
    """The same for what is in memory, and small."""
    if store == "gcs" and replaces:
        _replace_on_gcs(fs, data, path, replaces)
    else:
        fs.pipe_file(path, data, **_condition(store, replaces))


def tag_of(info: dict[str, Any]) -> str:
    """What changes with the content, and what conditions are about; most stores say one."""
    for name in ("generation", "ETag", "etag", "md5Hash"):  # Google's conditions take a generation
        if info.get(name):
            return str(info[name])
    return ""


def _condition(store: str | None, replaces: str | None) -> dict[str, Any]:
    """As the store's library takes it."""
    match store, replaces:
        case "azure", "":
            return {"overwrite": False}
        case "azure", str():
            from azure.core import MatchConditions

            unchanged = MatchConditions.IfNotModified
            return {"overwrite": True, "etag": replaces, "match_condition": unchanged}
        case "azure", None:
            return {"overwrite": True}
        case "s3", str() if replaces:
            return {"IfMatch": replaces}
        case _, "":
            return {"mode": "create"}
    return {}


def _replace_on_gcs(fs: Any, data: bytes, path: str, generation: str) -> None:
    """gcsfs can ask that nothing be there, but not that this be there."""
    bucket, key, _ = fs.split_path(path)
    boundary = secrets.token_hex(16)
    head = f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{json.dumps({'name': key})}\r\n"
    head += f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
    fs.call(
        "POST",
        f"{fs._location}/upload/storage/v1/b/{bucket}/o",
        uploadType="multipart",
        ifGenerationMatch=generation,
        headers={"Content-Type": f"multipart/related; boundary={boundary}"},
        data=b"".join((head.encode(), data, f"\r\n--{boundary}--".encode())),
    )
