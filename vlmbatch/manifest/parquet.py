"""Parquet manifests: a list of files as one sequence of rows, never read whole."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from vlmbatch.errors import ManifestError
from vlmbatch.manifest.columns import Columns, row_of
from vlmbatch.records import Range, Row
from vlmbatch.storage import without_secrets

BUFFER_BYTES = 8 * 2**20
BATCH_BYTES = 4 * 2**20
MAX_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of the manifest. ``name`` is relative to the manifest's folder.

    Its identity is (name, size, footer): never the modification time, which a copy changes.
    """

    name: str
    size: int
    footer: str
    rows: int
    row_groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The input table: files in the order of their paths, one sequence of rows over them."""

    folder: str
    """Relative image paths start here."""
    files: tuple[ManifestFile, ...]
    schema: pa.Schema

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def identity(self) -> str:
        """xxh3-128 hex over each file's name, size and footer."""
        digest = xxhash.xxh3_128()
        for file in self.files:
            digest.update(f"{file.name}\0{file.size}\0{file.footer}\n".encode())
        return digest.hexdigest()

    def boundaries(self) -> Iterator[int]:
        """Row numbers at which a file or a row group starts, ascending: cheap places to begin."""
        row = 0
        for file in self.files:
            for count in file.row_groups:
                yield row
                row += count

    def to_json(self) -> dict[str, Any]:
        """As run.json keeps it: the list that a resume uses again."""
        return {"folder": self.folder, "files": [asdict(file) for file in self.files]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Manifest:
        """As run.json has it; only the first file is looked at, each other when it is opened."""
        files = tuple(
            ManifestFile(**{**file, "row_groups": tuple(file["row_groups"])})
            for file in stored["files"]
        )
        first, schema = _look_at(stored["folder"], files[0].name)
        if first != files[0]:
            raise _changed(_join(stored["folder"], files[0].name))
        return cls(stored["folder"], files, schema)


def open_manifest(paths: Sequence[str], stored: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest that these files, folders and globs name; ``stored`` is an earlier listing.

    Footers are read one at a time. Raises ManifestError, naming the file and what was found.
    """
    if stored is None:
        folder, names = _list_files(paths)
    else:
        folder = stored["folder"]
        names = [file["name"] for file in stored["files"]]
    files: list[ManifestFile] = []
    schema: pa.Schema | None = None
    for name in names:
        file, found = _look_at(folder, name)
        if schema is not None and not _same_columns(schema, found):
            raise ManifestError(
                f"{_join(folder, name)} has other columns than {_join(folder, names[0])} "
                f"({_columns(found)} against {_columns(schema)})",
                hint="give a manifest whose files agree on column names and types",
            )
        schema = found if schema is None else schema
        files.append(file)
    assert schema is not None  # _list_files raises where there is no file
    return Manifest(folder, tuple(files), schema)


class RowStream:
    """Rows of ranges, in order. Consecutive ranges go on in the open file without re-reading."""

    def __init__(self, manifest: Manifest, columns: Columns) -> None:
        self._manifest = manifest
        self._columns = columns
        self._position = -1
        self._open: Iterator[Row] = iter(())

    def rows(self, wanted: Range) -> Iterator[Row]:
        """The rows of this range, one at a time. Raises ManifestError if the file changed."""
        if wanted.first != self._position:
            self._open = self._rows_from(wanted.first)
        for row in range(wanted.first, wanted.stop):
            self._position = row + 1
            try:
                found = next(self._open, None)
            except ManifestError as error:
                raise ManifestError(f"at row {row}: {error.message}", hint=error.hint) from None
            if found is None:
                raise ManifestError(f"the manifest ends before row {row}, which its footers count")
            yield found

    def _rows_from(self, first: int) -> Iterator[Row]:
        start = 0
        for file in self._manifest.files:
            if first < start + file.rows:
                yield from self._rows_of_file(file, start, max(first, start))
            start += file.rows

    def _rows_of_file(self, file: ManifestFile, start: int, first: int) -> Iterator[Row]:
        path = _join(self._manifest.folder, file.name)
        with _reading(path), pa.OSFile(path) as raw:
            found = _identity_of(raw, path)
            if found != (file.size, file.footer):
                raise _changed(path)
            source = pq.ParquetFile(raw, pre_buffer=False, buffer_size=BUFFER_BYTES)
            skip = first - start
            groups = list(range(len(file.row_groups)))
            while groups and skip >= file.row_groups[groups[0]]:
                skip -= file.row_groups[groups.pop(0)]
            row = first
            size = _batch_rows(source.metadata)
            batches = (  # group by group: a broken one must not take rows of another with it
                batch
                for group in groups
                for batch in source.iter_batches(
                    batch_size=size, row_groups=[group], columns=self._columns.to_read
                )
            )
            for batch in batches:
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                for record, problem in _records(batch.slice(skip)):
                    yield row_of(record, row, self._columns, problem)
                    row += 1
                skip = 0


def _records(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each row's values, and which of them Python cannot hold (text that is no UTF-8, a date after
    the year 9999), if any: those are None."""
    try:
        yield from ((record, None) for record in batch.to_pylist())
        return
    except (ValueError, OverflowError):
        pass  # one bad value, and the whole batch raises
    for index in range(batch.num_rows):
        record: dict[str, Any] = {}
        problem = None
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                record[name] = column[index].as_py()
            except (ValueError, OverflowError) as error:
                record[name] = None
                why = "is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
                problem = problem or f"column {name!r} {why}"
        yield record, problem


def _changed(path: str) -> ManifestError:
    return ManifestError(
        f"{path} changed since this run was planned",
        hint="run the same command again to see what changed",
    )


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows per batch so that a batch holds about BATCH_BYTES uncompressed."""
    total = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    per_row: int = max(1, total // max(1, metadata.num_rows))
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // per_row))


def _list_files(paths: Sequence[str]) -> tuple[str, list[str]]:
    """(folder that relative image paths start from, sorted file names relative to it)."""
    found: list[str] = []
    folders: list[str] = []
    for path in paths:
        local = _local(path)
        if "://" in local:
            raise ManifestError(
                f"cannot read a manifest from {local.partition('://')[0]}: {without_secrets(path)}",
                hint="this version reads local Parquet files, folders and globs",
            )
        if os.path.isdir(local):
            outputs = {ours.parent for ours in Path(local).rglob("__vlmbatch")} - {Path(local)}
            inside = [
                str(p)
                for p in Path(local).rglob("*.parquet")
                if not p.is_dir() and not _hidden(p.relative_to(local)) and p.parent not in outputs
            ]
            _require(inside, f"no *.parquet file in the folder {path}")
            folders.append(local)
            found += inside
        elif os.path.exists(local):
            folders.append(os.path.dirname(local))
            found.append(local)
        elif glob.has_magic(local):
            matched = [p for p in glob.glob(local, recursive=True) if os.path.isfile(p)]
            _require(matched, f"nothing matches {path}")
            folders.append(_plain_folder(local))
            found += matched
        else:
            raise _not_found(path)
    folder = os.path.abspath(folders[0] or ".")
    names = sorted({os.path.relpath(os.path.abspath(p), folder) for p in found})
    for name in (folder, *names):
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ManifestError(f"a name is not valid UTF-8: {name!r}", hint="rename it")
    return folder, names


def _local(path: str) -> str:
    """The path that a file: URI means; any other path as it is."""
    if not path.startswith("file:/"):
        return path
    return unquote(path.removeprefix("file:").removeprefix("//localhost").replace("///", "/", 1))


def _not_found(path: str) -> ManifestError:
    if os.path.islink(path):
        return ManifestError(
            f"no manifest {path}: it is a link to {os.readlink(path)}, which does not exist"
        )
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return ManifestError(f"no manifest {path}: there is no folder {folder}")
    there = sorted(name for name in os.listdir(folder) if name.endswith(".parquet"))[:5]
    found = f"Parquet files there: {', '.join(there)}" if there else "no Parquet file there"
    return ManifestError(f"no manifest {path}", hint=found)


def _require(found: list[str], message: str) -> None:
    if not found:
        raise ManifestError(message, hint="a manifest is a Parquet file, a folder or a glob")


def _hidden(relative: Path) -> bool:
    return any(part.startswith((".", "_")) for part in relative.parts)


def _plain_folder(pattern: str) -> str:
    plain = []
    for part in pattern.split("/")[:-1]:
        if glob.has_magic(part):
            break
        plain.append(part)
    return "/".join(plain) or ("/" if pattern.startswith("/") else "")


def _join(folder: str, name: str) -> str:
    return os.path.normpath(os.path.join(folder, name))


class _reading:
    """Turns what pyarrow and the OS raise on an unreadable file into a ManifestError."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, pa.ArrowException | OSError | ValueError):
            said = (str(error).strip() or kind.__name__).splitlines()[0]
            reason = "".join(letter if letter.isprintable() else "?" for letter in said)
            raise ManifestError(
                f"cannot read {self._path}: {reason}",
                hint="a manifest is Parquet; check that the file is whole",
            ) from None


def _look_at(folder: str, name: str) -> tuple[ManifestFile, pa.Schema]:
    path = _join(folder, name)
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe waits for its writer
        raise ManifestError(
            f"cannot read {path}: it is a pipe, socket or device",
            hint="a manifest is read more than once: give a file",
        )
    with _reading(path), open(path, "rb") as raw:
        size, footer = _identity_of(raw, path)
        source = pq.ParquetFile(raw)
        groups = tuple(
            source.metadata.row_group(i).num_rows for i in range(source.metadata.num_row_groups)
        )
        file = ManifestFile(name, size, footer, source.metadata.num_rows, groups)
        return file, source.schema_arrow


def _identity_of(raw: Any, path: str) -> tuple[int, str]:
    """(size in bytes, xxh3-128 hex of the Parquet footer)."""
    size = raw.seek(0, os.SEEK_END)
    if size < 12:
        raise ManifestError(
            f"cannot read {path}: {size} bytes are no Parquet file",
            hint="write it again; a manifest without rows still has a schema",
        )
    raw.seek(size - 8)
    tail = raw.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length + 12 > size:
        raise ManifestError(
            f"cannot read {path}: it is no Parquet file, or its end is missing",
            hint="a manifest is Parquet; check that the file is whole",
        )
    raw.seek(size - 8 - length)
    digest = xxhash.xxh3_128_hexdigest(raw.read(length))
    raw.seek(0)
    return size, digest


def _same_columns(a: pa.Schema, b: pa.Schema) -> bool:
    return {f.name: f.type for f in a} == {f.name: f.type for f in b}


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
