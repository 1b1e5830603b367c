"""Which model a name stands for: the one in the package, a local folder, or one of the Hub.

Needs neither torch nor transformers; huggingface_hub is imported only for a Hub id.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from vlmbatch.errors import UsageError

DEMO = "demo"
HUB_SECONDS = 10
"""How long the Hub may take to say which commit a revision is."""

FINGERPRINTED = frozenset({".json", ".safetensors", ".bin", ".jinja", ".txt", ".model", ".py"})
"""The suffixes of the files that decide what a model answers."""

WHOLE_UP_TO = 64 * 2**20
EDGE = 2**20

_COMMIT = re.compile(r"[0-9a-f]{40}")
_OTHER_MODEL = "name a local model folder with -m, or -m demo"


class ModelNotFound(UsageError):
    """The model is neither in the package, nor a folder, nor known to the Hub or its cache."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that was found, and exactly which one.

    ``path`` is what an engine loads: a folder, or a Hub id to be loaded at ``revision``.
    ``revision`` is the Hub commit, or ``xxh3:`` and the hex fingerprint of the folder's content.
    ``config`` is config.json.
    """

    name: str
    path: str
    revision: str
    config: dict[str, Any]

    @property
    def is_local(self) -> bool:
        return self.revision.startswith("xxh3:")

    @property
    def label(self) -> str:
        """The results' ``model`` column: ``id@revision``, 12 digits of it; a folder by its name."""
        shown = self.name
        if self.is_local and self.name != DEMO:
            shown = Path(self.path).name
        return f"{shown}@{self.revision.removeprefix('xxh3:')[:12]}"


def resolve_model(
    name: str, revision: str | None = None, *, offline: bool = False
) -> ResolvedModel:
    """The model behind ``-m name``; ``offline`` asks the Hub's local cache only.

    Of a Hub model only config.json is fetched. Raises ModelNotFound; without a network within
    seconds.
    """
    if name == DEMO:
        return _local(name, demo_path(), revision)
    folder = os.path.expanduser(name)  # Path.expanduser and Path.is_dir raise on odd names
    if os.path.isdir(folder):
        return _local(name, Path(folder).resolve(), revision)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"no such model folder: {name}", hint=_OTHER_MODEL)
    return _from_hub(name, revision, offline)


def demo_path() -> Path:
    """The folder of the demo model inside this package."""
    return Path(__file__).parent / "demo"


def folder_fingerprint(folder: Path) -> str:
    """xxh3-128 hex over name, size and content of the files that decide the answers.

    Of a file above 64 MiB only the size and the first and last MiB count: reading tens of GB at
    each start would cost minutes, and other weights of the same size do not begin and end alike
    (a safetensors file begins with the names and shapes of its tensors).
    """
    digest = xxhash.xxh3_128()
    for file in sorted(
        _fingerprinted(folder), key=lambda file: file.relative_to(folder).as_posix()
    ):
        name, size = file.relative_to(folder).as_posix().encode(), file.stat().st_size
        digest.update(len(name).to_bytes(8) + name + size.to_bytes(8))
        with file.open("rb") as stream:
            if size <= WHOLE_UP_TO:
                digest.update(stream.read())
            else:
                digest.update(stream.read(EDGE))
                stream.seek(-EDGE, 2)
                digest.update(stream.read(EDGE))
    return digest.hexdigest()


def _fingerprinted(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix in FINGERPRINTED and not hidden and file.is_file():
            yield file


def _local(name: str, folder: Path, revision: str | None) -> ResolvedModel:
    config = folder / "config.json"
    if not config.is_file():
        if name == DEMO:
            raise ModelNotFound(
                f"the demo model is missing from this installation ({folder})",
                hint="install vlmbatch again, or name another model with -m",
            )
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        raise ModelNotFound(
            f"no config.json in the model folder {folder} (it has: {found})", hint=_OTHER_MODEL
        )
    fingerprint = f"xxh3:{folder_fingerprint(folder)}"
    if revision not in (None, fingerprint) and not str(revision).startswith("xxh3:"):
        raise UsageError(
            f"--revision {revision} was given for the local model {name}",
            hint="revisions belong to Hub ids: leave --revision out",
        )
    return ResolvedModel(name, str(folder), fingerprint, _with_preprocessor(config))


def _from_hub(name: str, revision: str | None, offline: bool) -> ResolvedModel:
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise ModelNotFound(
            f"model {name} cannot be looked up on the Hub without the library huggingface_hub",
            hint="pip install 'vlmbatch[hub]', or " + _OTHER_MODEL,
        ) from None
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelNotFound(
            f"'{name}' is neither a model folder nor a Hub id (owner/name)", hint=_OTHER_MODEL
        ) from None
    config = _cached_config(name, revision) if _is_commit(revision) else None
    why = "it is not in the local cache, and the Hub is not asked offline"
    if config is None and not offline:
        config, why = _fetched_config(name, revision)
    config = config or _cached_config(name, revision)
    if config is None:
        at = f" at revision {revision}" if revision else ""
        raise ModelNotFound(f"model {name}{at} was not found: {why}", hint=_OTHER_MODEL)
    return ResolvedModel(name, name, config.parent.name, _with_preprocessor(config))


def _is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def _cached_config(name: str, revision: str | None) -> Path | None:
    """``.../snapshots/<commit>/config.json`` in the Hub's local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _fetched_config(name: str, revision: str | None) -> tuple[Path | None, str]:
    """config.json of the commit that ``revision`` is now; else None and why.

    The Hub is asked once before anything is fetched: fetching tries again for half a minute.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub import errors as hub

    try:
        commit = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS).sha
        found = _cached_config(name, commit)
        if found is None:
            found = Path(hf_hub_download(name, "config.json", revision=commit))
            with contextlib.suppress(hub.EntryNotFoundError):  # families read its sizes
                hf_hub_download(name, "preprocessor_config.json", revision=commit)
        return found, ""
    except hub.GatedRepoError:
        return None, "it is gated: accept its terms on the Hub, then log in with `hf auth login`"
    except hub.RepositoryNotFoundError:
        return None, "the Hub does not know it (or it is private: log in with `hf auth login`)"
    except hub.RevisionNotFoundError:
        return None, "the Hub does not know this revision"
    except hub.EntryNotFoundError:
        return None, "it has no config.json, so it is no model that vlmbatch can load"
    except hub.OfflineModeIsEnabled:
        return None, "it is not in the local cache, and HF_HUB_OFFLINE is set"
    except Exception as error:  # the HTTP library, and so its errors, change between versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return None, f"it is not in the local cache, and the Hub cannot be reached ({reason})"


def _with_preprocessor(config: Path) -> dict[str, Any]:
    """config.json, with the image processor's settings beside it as ``preprocessor``."""
    loaded = _read(config)
    own = config.parent / "preprocessor_config.json"
    whole = config.parent / "processor_config.json"
    if own.is_file():
        return {**loaded, "preprocessor": _read(own)}
    if whole.is_file() and isinstance(nested := _read(whole).get("image_processor"), dict):
        return {**loaded, "preprocessor": nested}
    return loaded


def _read(config: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(config.read_bytes())
    except ValueError as error:
        raise UsageError(f"{config} is not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{config} holds no JSON object")
    return loaded
