"""What Delta tables and Lance datasets share: folders of versions, read by their own library."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from vlmbatch.errors import ManifestError, ManifestUnreachable, UsageError, VlmbatchError
from vlmbatch.manifest.files import Place
from vlmbatch.storage import said


@dataclass(frozen=True)
class Table:
    """A folder that is one table: what its log says of the other files, no listing tells."""

    format: str
    called: str
    folder: str
    """Relative to the folder that was listed."""


_LOGS = (
    ("_delta_log/", "", "delta", "a Delta table"),
    ("_versions/", ".manifest", "lance", "a Lance dataset"),
    ("metadata/", ".metadata.json", "iceberg", "an Iceberg table"),
    (".hoodie/", "", "hudi", "a Hudi table"),
)
"""(folder of the log, how names in it end, format, called)."""


def table_among(names: Iterable[str]) -> Table | None:
    """The first table to which one of these paths belongs."""
    for name in names:
        for log, ending, format, called in _LOGS:
            if log in name and name.endswith(ending):
                folder, found, _ = f"/{name}".rpartition(f"/{log}")
                if found:
                    return Table(format, called, folder.strip("/"))
    return None


def library(name: str, extra: str, called: str) -> ModuleType:
    """The library that reads such a table; raises UsageError with the pip command that adds it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{called} needs a library that is not installed ({error})",
            hint=f"pip install 'vlmbatch[{extra}]'",
        ) from None


def storage_options() -> dict[str, str]:
    """For deltalake and pylance, which take everything else from the store's own variables in the
    environment; s3fs takes an ``http:`` endpoint as it is, and they do not."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    options = {"endpoint_url": endpoint} if endpoint else {}
    return {**options, "allow_http": "true"} if endpoint.startswith("http:") else options


@contextmanager
def reading_table(place: Place, called: str) -> Iterator[None]:
    """Turns what a table's library raises, which has no types for it, into an error of ours.

    ManifestUnreachable in a store: its folder was listed, so that the library's own access to the
    store comes first among the causes."""
    try:
        yield
    except VlmbatchError:
        raise
    except Exception as error:
        version = "" if place.version is None else f"version {place.version} of "
        what = re.split(r" 0: |, /\S*\.rs:", said(error))[0]  # without Rust's stack
        message = f"cannot read {version}the {called} {place.path}: {what}"
        if place.is_local:
            raise ManifestError(
                message, hint="check that the table is whole, and has that version"
            ) from None
        raise ManifestUnreachable(
            message,
            hint="its library takes region and credentials from the environment (AWS_REGION, "
            "AWS_ACCESS_KEY_ID, ...), on every node",
        ) from None
