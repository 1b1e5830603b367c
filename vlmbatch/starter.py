"""``vlmbatch init``: a commented job spec, from a manifest that is looked at."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmbatch.errors import UsageError
from vlmbatch.families import entry_of
from vlmbatch.job import JobSpec, TaskSpec
from vlmbatch.manifest import Manifest, open_manifest
from vlmbatch.manifest.columns import ASKED, choose_columns, likely_image
from vlmbatch.models import DEMO, ModelNotFound, resolve_model
from vlmbatch.resolve import DEFAULT_MODEL
from vlmbatch.run import output_folder
from vlmbatch.templates import template

TASK_OF = {"question": "vqa", "questions": "vqa", "phrase": "ground", "labels": "detect"}


@dataclass(frozen=True, slots=True)
class Started:
    """The spec that was written."""

    path: str
    manifest: str
    """How much it was found to hold."""
    tasks: tuple[str, ...]
    model: str

    def as_text(self) -> str:
        asked = " + ".join(self.tasks)
        return (
            f"{self.path}: {self.manifest}, {asked} by {self.model}\n"
            f"next: vlmbatch run --job {self.path} --set limit=20"
        )


@dataclass(frozen=True, slots=True)
class _Chosen:
    model: str
    why: str
    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    """Tasks that the manifest has a column for, and the model was not trained for."""


def write_spec(
    manifests: Sequence[str], path: str, *, model: str | None = None, overwrite: bool = False
) -> Started:
    """Raises UsageError where a file is there, ManifestError for a manifest without images."""
    if os.path.lexists(path) and not overwrite:
        raise UsageError(
            f"{path} is there already", hint="another -o, or --overwrite to write it anew"
        )
    manifest = open_manifest(list(manifests))
    columns = _columns(manifest)
    chosen = _choose(manifest, model)
    spec = JobSpec(manifest=list(manifests), tasks=[TaskSpec(name=name) for name in chosen.tasks])
    names = [name for name in manifest.schema.names if name != columns.get("image", "image")]
    text = template("starter.yaml").render(
        path=path,
        manifests=[_scalar(each) for each in manifests],
        extent=manifest.extent,
        form=manifest.files[0].format,
        found=", ".join(f"{field.name} ({_short(field.type)})" for field in manifest.schema),
        output=_scalar(output_folder(spec)),
        model=_scalar(chosen.model),
        why=chosen.why,
        columns={ours: _scalar(theirs) for ours, theirs in columns.items()},
        tasks=chosen.tasks,
        left_out=chosen.left_out,
        others=[_scalar(name) for name in names if name not in ("id", *ASKED)],
    )
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    return Started(path, manifest.extent, chosen.tasks, chosen.model)


def _columns(manifest: Manifest) -> dict[str, str]:
    """Our name for the column of images, where it has another one.

    Raises ManifestError where no column can be one, or what is asked is of a type that is no text.
    """
    names, likely = manifest.schema.names, likely_image(manifest.schema)
    given = {"image": likely} if "image" not in names and likely in names else {}
    where = manifest.files[0].name if len(manifest.files) == 1 else manifest.folder
    choose_columns(manifest.schema, given, [], where=where)
    return given


def _choose(manifest: Manifest, model: str | None) -> _Chosen:
    """The tasks that both the manifest's columns and the model fit."""
    named = model or os.environ.get("VLMBATCH_MODEL")
    why = "" if model else "from VLMBATCH_MODEL"
    try:
        found = resolve_model(named or DEFAULT_MODEL)
        why = why if named else "a small one for a start"
    except ModelNotFound:
        if named:
            raise
        found = resolve_model(DEMO)
        why = f"knows only simple coloured shapes; {DEFAULT_MODEL} cannot be fetched here"
    fits = tuple(
        dict.fromkeys(TASK_OF[name] for name in ASKED if name in manifest.schema.names)
    ) or ("caption",)
    can = entry_of(found.config, found.name).tasks
    tasks = tuple(task for task in fits if task in can)
    left_out = tuple(task for task in fits if task not in can)
    return _Chosen(named or found.name, why, tasks or ("caption",), left_out)


def _short(kind: object) -> str:
    text = str(kind)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _scalar(text: str) -> str:
    """As YAML; quoted where it would be read as something else."""
    import yaml

    plain = (text and text[0].isalpha()) or text[:1] in ("/", ".")
    special = any(letter in text for letter in ":#{}[],&*!|>'\"%@`\\\n\t")
    try:
        same = yaml.safe_load(text) == text
    except yaml.YAMLError:
        same = False
    if plain and same and (not special or ("://" in text and text.count(":") == 1)):
        return text
    return json.dumps(text, ensure_ascii=False)
