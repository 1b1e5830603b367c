"""What paths, folders, globs and names of the Hub stand for: files of one kind, listed once."""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from vlmbatch.errors import ManifestError, ManifestUnreachable, UsageError
from vlmbatch.manifest import hub, images
from vlmbatch.manifest.files import Place, reading, tried
from vlmbatch.manifest.formats import FORMATS, KNOWN, TABLES, format_of, sniffed
from vlmbatch.manifest.tables import Table, table_among
from vlmbatch.storage import filesystem_of, scheme_of, with_plain_scheme, without_secrets

A_MANIFEST = "a manifest is a file, a folder or a glob of them: " + KNOWN
OURS = "__vlmbatch"


@dataclass(frozen=True)
class Listing:
    """Files, sorted, relative to ``folder``, all of one format; sizes in bytes, of images only."""

    folder: str
    format: str
    sizes: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return list(self.sizes)


@dataclass(frozen=True)
class Filters:
    """--include and --exclude: globs over the paths below a folder, or over the names alone."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def take(self, relative: str) -> bool:
        wanted = not self.include or any(_matches(relative, each) for each in self.include)
        return wanted and not any(_matches(relative, each) for each in self.exclude)


def _matches(relative: str, pattern: str) -> bool:
    return fnmatchcase(relative if "/" in pattern else posixpath.basename(relative), pattern)


@dataclass
class _Found:
    """What one path stands for: absolute paths and their sizes, if the listing told them."""

    folder: str
    files: dict[str, int | None] = field(default_factory=dict)
    format: str = ""
    note: str | None = None


def list_files(paths: Sequence[str], filters: Filters | None = None) -> Listing:
    """Raises ManifestError where nothing is there, or files of several kinds are."""
    filters = filters or Filters()
    found: list[_Found] = []
    for path in paths:
        path = _meant(path)
        store = _store_of(path)
        found += [_found(store, one, filters) for one in _unfolded(store, path)]
    if len({scheme_of(each.folder) for each in found}) > 1:
        raise ManifestError("a manifest is in one place: local files, or those of one store")
    formats = Counter(each.format for each in found)
    if len(formats) > 1:
        raise _mixed(" and ".join(map(str, paths)), formats)
    store = _store_of(found[0].folder)
    folder = store.absolute(found[0].folder or ".")
    sizes: dict[str, int] = {}
    for each in found:
        for path, size in each.files.items():
            sizes[store.relative(store.absolute(path), folder)] = (
                0 if found[0].format != images.NAME else size_of(path, size)
            )
    for name in (folder, *sizes):
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ManifestError(f"a name is not valid UTF-8: {name!r}", hint="rename it")
    notes = tuple(each.note for each in found if each.note)
    return Listing(folder, found[0].format, dict(sorted(sizes.items())), notes)


def sizes_below(folder: str, names: Iterable[str]) -> dict[str, int]:
    """The sizes in bytes that these files have now; those that are gone are left out."""
    if scheme_of(folder) is None:
        there = (name for name in names if os.path.exists(Place(folder, name).path))
        return {name: os.stat(Place(folder, name).path).st_size for name in there}
    wanted = set(names)
    store = _Remote()
    sizes = {store.relative(path, folder): size for path, size in store.find(folder).items()}
    return {name: size or 0 for name, size in sizes.items() if name in wanted}


def size_of(path: str, size: int | None) -> int:
    """A link to nothing has no bytes: its row fails."""
    if size is None and os.path.exists(path):
        return os.stat(path).st_size
    return size or 0


def _found(store: _Store, path: str, filters: Filters) -> _Found:
    kind = store.kind(path)
    if kind == "folder":
        return _in_folder(store, path, filters)
    if kind == "file":
        place = Place(store.folder_of(path), store.name_of(path))
        return _Found(place.folder, {path: None}, format_of(path) or sniffed(place))
    if glob.has_magic(path):
        folder = _plain_folder(path)
        if store.kind(f"{folder or '.'}/_delta_log") == "folder":
            raise ManifestError(
                f"{path} also matches files that are no longer part of the Delta table {folder}",
                hint="give the table: its folder",
            )
        matched = {
            each: size
            for each, size in store.glob(path).items()
            if filters.take(store.relative(each, folder) if folder else each)
        }
        _require(matched, f"nothing matches {without_secrets(path)}")
        found = _Found(folder)
        _choose(found, matched, path, store)
        return found
    raise store.not_found(path)


def _in_folder(store: _Store, path: str, filters: Filters) -> _Found:
    everything = store.find(path)
    relative = {store.relative(each, path): each for each in everything}
    if table := table_among(relative):
        return _is_table(store, path, table, filters)
    outputs = {name.rpartition(f"{OURS}/")[0] for name in relative if f"/{OURS}/" in f"/{name}"}
    kept = {
        name: full
        for name, full in relative.items()
        if not _is_hidden(name, format_of(name))
        and not any(output and name.startswith(output) for output in outputs)
        and filters.take(name)
    }
    configured = hub.data_files(relative.get("README.md"), kept)
    found = _Found(path, note=configured.note)
    names = [name for name in configured.names if format_of(name)]
    if not names:
        raise ManifestError(
            f"no manifest and no image in the folder {path}"
            + (" that --include and --exclude let pass" if filters else ""),
            hint=A_MANIFEST,
        )
    _choose(found, {kept[name]: everything[kept[name]] for name in names}, path, store)
    return found


def _is_table(store: _Store, path: str, table: Table, filters: Filters) -> _Found:
    if table.folder:
        raise ManifestError(
            f"{path} holds {table.called}: {table.folder}", hint="give the table by itself"
        )
    if table.format not in FORMATS:
        raise ManifestError(
            f"{path} is {table.called}, whose folder holds files that are no longer part of it too",
            hint="write its current version as Parquet, and give that",
        )
    if filters:
        raise UsageError(f"{path} is {table.called}, of which --include and --exclude take no part")
    path = store.absolute(path)
    return _Found(store.folder_of(path), {path: None}, table.format)


def _choose(found: _Found, files: dict[str, int | None], where: str, store: _Store) -> None:
    """Tables are the manifest where there are any, then tars, then images."""
    kinds = {path: format_of(path) for path in files}
    if not any(kinds.values()):
        places = {path: Place(store.folder_of(path), store.name_of(path)) for path in files}
        kinds = {path: sniffed(place) for path, place in places.items()}
    formats = Counter(kind for kind in kinds.values() if kind)
    tables = {kind: count for kind, count in formats.items() if kind in TABLES}
    if len(tables) > 1:
        raise _mixed(where, tables)
    found.format = next(iter(tables)) if tables else max(formats, key="webdataset".__eq__)
    found.files = {path: files[path] for path, kind in kinds.items() if kind == found.format}
    others = sum(formats.values()) - len(found.files)
    if others:
        called, count = FORMATS[found.format].CALLED, len(found.files)
        files_are = "file is" if count == 1 else "files are"
        found.note = (
            f"{without_secrets(where)}: its {count} {called.partition(' (')[0]} {files_are} the "
            f"manifest; {others:,} images or tars beside them are read only if it names them"
        )


def _mixed(where: str, counts: dict[str, int]) -> ManifestError:
    said = ", ".join(f"{count} {FORMATS[kind].CALLED}" for kind, count in counts.items())
    return ManifestError(
        f"{where} holds files of several kinds: {said}",
        hint="say which with a glob, as in 'folder/*.parquet', or with --include",
    )


def _is_hidden(name: str, kind: str | None) -> bool:
    """Cameras begin names with an underscore; of tables, such names are no data."""
    marks = (".", "__MACOSX") if kind == images.NAME else (".", "_")
    return any(part.startswith(marks) for part in name.split("/"))


def _require(found: Any, message: str) -> None:
    if not found:
        raise ManifestError(message, hint=A_MANIFEST)


def _plain_folder(pattern: str) -> str:
    """The folders before the first one with a wildcard."""
    scheme, separator, rest = pattern.rpartition("://")
    plain = []
    for part in rest.split("/")[:-1]:
        if glob.has_magic(part):
            break
        plain.append(part)
    return scheme + separator + ("/".join(plain) or ("/" if rest.startswith("/") else ""))


# what is meant by a word


def _meant(path: str) -> str:
    """A local path, or the URI of a place in a store, with the Hub's commit where it is one."""
    if path == "-":
        raise ManifestError(
            "a manifest is read more than once, and cannot come from a pipe",
            hint="write it to a file first",
        )
    if path.startswith("file:/"):
        path = path.removeprefix("file:").removeprefix("//localhost").replace("///", "/", 1)
        return unquote(path)
    path, scheme = with_plain_scheme(path), scheme_of(path)
    if scheme is None:
        named = hub.is_name(path) and not os.path.lexists(path) and format_of(path) is None
        return _of_the_hub(path) if named and hub.is_here() else path
    if "::" in path:
        raise ManifestError(
            f"cannot read a manifest from inside an archive: {without_secrets(path)}",
            hint="unpack it first",
        )
    if scheme in ("http", "https") and without_secrets(path) != path:
        raise ManifestError(
            f"cannot read {without_secrets(path)} with a query, user or password in its address: "
            "it would be stored in the output",
            hint="download it first",
        )
    if not path.partition("://")[2].strip("/"):
        raise ManifestError(f"{path} names no bucket", hint="as in s3://bucket/rows.parquet")
    if without_secrets(path) != path:
        raise ManifestError(
            f"credentials do not belong into the address of {without_secrets(path)}",
            hint="set the store's own variables in the environment",
        )
    return hub.pinned(path) if scheme == "hf" else path.rstrip("/")


def _of_the_hub(name: str) -> str:
    try:
        return hub.pinned(f"hf://datasets/{name}")
    except (ManifestError, ManifestUnreachable) as error:
        raise type(error)(
            f"no manifest {name}: there is no such file or folder here, and as a dataset of the "
            f"Hub: {error.message}",
            hint=error.hint,
        ) from None


def _unfolded(store: _Store, path: str) -> Iterator[str]:
    """Braces as in a shell: ``{000..012}`` and ``{a,b}``, unless there is a file of that name."""
    match = re.search(r"\{(?:([0-9]+)\.\.([0-9]+)|([^{}]*,[^{}]*))\}", path)
    if match is None or store.kind(path) is not None:
        yield path
        return
    first, last, words = match.groups()
    if words is None:
        width = len(first) if first.startswith("0") else 0
        if int(last) - int(first) > 1_000_000:
            raise UsageError(f"{path} stands for more than a million files")
        items = [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]
        _require(items, f"{path}: {first} is after {last}")
    else:
        items = words.split(",")
    for item in items:
        yield from _unfolded(store, path[: match.start()] + item + path[match.end() :])


# the local disk and the stores, alike


class _Store(Protocol):
    def kind(self, path: str) -> str | None: ...
    def find(self, folder: str) -> dict[str, int | None]: ...
    def glob(self, pattern: str) -> dict[str, int | None]: ...
    def not_found(self, path: str) -> ManifestError: ...
    def absolute(self, path: str) -> str: ...
    def relative(self, path: str, folder: str) -> str: ...
    def folder_of(self, path: str) -> str: ...
    def name_of(self, path: str) -> str: ...


def _store_of(path: str) -> _Store:
    return _Local() if scheme_of(path) is None else _Remote()


class _Local:
    def kind(self, path: str) -> str | None:
        if os.path.isdir(path):
            return "folder"
        return "file" if os.path.exists(path) else None

    def find(self, folder: str) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for where, _, names in os.walk(folder):
            found.update((os.path.join(where, name), None) for name in names)
        return found

    def glob(self, pattern: str) -> dict[str, int | None]:
        return dict.fromkeys(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))

    def not_found(self, path: str) -> ManifestError:
        if os.path.islink(path):
            return ManifestError(
                f"no manifest {path}: it is a link to {os.readlink(path)}, which does not exist"
            )
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            return ManifestError(f"no manifest {path}: there is no folder {folder}")
        names = sorted(name for name in os.listdir(folder) if format_of(name))
        there = [name for name in names if format_of(name) != images.NAME] or names
        hint = f"there: {', '.join(there[:5])}" if there else A_MANIFEST
        return ManifestError(f"no manifest {path}", hint=hint)

    def absolute(self, path: str) -> str:
        return os.path.abspath(path)

    def relative(self, path: str, folder: str) -> str:
        return os.path.relpath(path, folder)

    def folder_of(self, path: str) -> str:
        return str(Path(path).parent)

    def name_of(self, path: str) -> str:
        return os.path.basename(path)


class _Remote:
    def kind(self, path: str) -> str | None:
        fs, inside = filesystem_of(path)
        if scheme_of(path) in ("http", "https"):  # a folder is a page there
            return None if glob.has_magic(path) or "{" in path else "file"
        try:
            with reading(path):
                found = tried(lambda: fs.info(inside))
                return "folder" if found["type"] == "directory" else "file"
        except ManifestError:
            return None

    def find(self, folder: str) -> dict[str, int | None]:
        fs, inside = filesystem_of(folder)
        with reading(folder):
            found = tried(lambda: fs.find(inside, detail=True))
        return self._uris(fs, found, folder)

    def glob(self, pattern: str) -> dict[str, int | None]:
        fs, inside = filesystem_of(pattern)
        with reading(pattern):
            found = tried(lambda: fs.glob(inside, detail=True))
        return self._uris(fs, found, pattern)

    def _uris(self, fs: Any, found: dict[str, Any], like: str) -> dict[str, int | None]:
        """The libraries leave the scheme out, and adlfs the account of ``container@account``."""
        scheme, _, rest = like.partition("://")
        place = f"{scheme}://{rest.partition('/')[0]}"
        return {
            path if "://" in path else f"{place}/{path.partition('/')[2]}": info.get("size")
            for path, info in found.items()
            if info["type"] == "file" and not path.endswith("/")
        }

    def not_found(self, path: str) -> ManifestError:
        folder = self.folder_of(path)
        fs, inside = filesystem_of(folder)
        try:
            with reading(folder):
                names = sorted(self.name_of(each) for each in fs.ls(inside, detail=False))
        except ManifestError:
            return ManifestError(f"no manifest {path}: there is no {folder}")
        there = [name for name in names if format_of(name)][:5]
        hint = f"there: {', '.join(there)}" if there else A_MANIFEST
        return ManifestError(f"no manifest {path}", hint=hint)

    def absolute(self, path: str) -> str:
        return path

    def relative(self, path: str, folder: str) -> str:
        if path.startswith(f"{folder.rstrip('/')}/"):
            return path[len(folder.rstrip("/")) + 1 :]
        bare, base = (each.partition("://")[2] for each in (path, folder))
        return posixpath.relpath(bare, base)

    def folder_of(self, path: str) -> str:
        return path.rpartition("/")[0]

    def name_of(self, path: str) -> str:
        return path.rpartition("/")[2]
