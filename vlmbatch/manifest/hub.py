"""Datasets as the Hugging Face Hub lays them out: there, or in a local folder of the same form."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from vlmbatch.errors import ManifestError
from vlmbatch.manifest.files import reading
from vlmbatch.storage import filesystem_of

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class DataFiles:
    """What of a folder is data, and why, if its README says so."""

    names: list[str]
    note: str | None = None


def is_name(path: str) -> bool:
    """Whether it may be ``owner/name`` of a dataset."""
    return _NAME.fullmatch(path) is not None


def is_here() -> bool:
    return importlib.util.find_spec("huggingface_hub") is not None


def pinned(uri: str) -> str:
    """``hf://datasets/owner/name@commit/path``: what a name stands for now, whatever comes later.

    Raises ManifestError or ManifestUnreachable.
    """
    fs, path = filesystem_of(uri)
    with reading(uri, "a dataset is named owner/name"):
        resolved = fs.resolve_path(path)
        commit = getattr(resolved, "revision", None)
        if commit is None:
            return uri  # a bucket, which has no commits
        if not _COMMIT.fullmatch(commit):
            from huggingface_hub import HfApi

            commit = (
                HfApi(endpoint=fs.endpoint, token=fs.token)
                .repo_info(resolved.repo_id, repo_type=resolved.repo_type, revision=commit)
                .sha
            )
    inside = f"/{resolved.path_in_repo}" if resolved.path_in_repo else ""
    return f"hf://{resolved.repo_type}s/{resolved.repo_id}@{commit}{inside}"


def data_files(readme: str | None, names: Mapping[str, str]) -> DataFiles:
    """Those files that ``configs`` in the README's head names, else all of them.

    Source: huggingface.co/docs/hub/datasets-manual-configuration.
    """
    configs = _configs(readme) if readme is not None else []
    if not configs:
        return DataFiles(sorted(names))
    config = configs[0]
    if len(configs) > 1:
        chosen = [c for c in configs if c.get("default") or c.get("config_name") == "default"]
        if len(chosen) != 1:
            said = "; ".join(f"{c.get('config_name')}: {', '.join(_patterns(c))}" for c in configs)
            raise ManifestError(
                f"{readme} names several configurations, and none as the default ({said})",
                hint="give the files of one of them as a glob",
            )
        config = chosen[0]
    patterns = _patterns(config)
    if not patterns:
        return DataFiles(sorted(names))
    kept = sorted(name for name in names if any(_is_in(name, each) for each in patterns))
    note = f"{readme}: configuration {config.get('config_name', 'default')!r}, that is "
    return DataFiles(kept, note + ", ".join(patterns))


def _is_in(name: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    plain = pattern.replace("**/", "")
    return fnmatchcase(name, pattern) or fnmatchcase(name, plain) or name.startswith(f"{pattern}/")


def _patterns(config: Mapping[str, Any]) -> list[str]:
    """Of all splits, relative to ``data_dir`` if there is one."""
    found = config.get("data_files")
    below = f"{str(config['data_dir']).strip('/')}/" if config.get("data_dir") else ""
    items = found if isinstance(found, list) else [found] if found is not None else []
    patterns: list[str] = []
    for item in items:
        path = item.get("path") if isinstance(item, dict) else item
        patterns += [str(each) for each in (path if isinstance(path, list) else [path]) if each]
    if not patterns and below:
        return [f"{below}**"]
    return [below + each for each in patterns]


def _configs(readme: str) -> list[dict[str, Any]]:
    import yaml

    fs, path = filesystem_of(readme)
    with reading(readme):
        text = fs.cat_file(path, start=0, end=2**20).decode(errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if head is None:
        return []
    try:
        values = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return []
    configs = values.get("configs") if isinstance(values, dict) else None
    return [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []
