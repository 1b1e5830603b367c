"""A data set of the Hugging Face Hub: the Parquet files of ``trl`` with a card, uploaded.

The card says which model answered, what was asked and what was left out: synthetic data that does
not say so is of little use to others.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from vlmbatch.errors import RunStopped, UsageError
from vlmbatch.exports.base import ImageMode, Sink
from vlmbatch.exports.conversations import said
from vlmbatch.exports.pieces import Piece
from vlmbatch.exports.sinks import ParquetSink
from vlmbatch.exports.trl import Trl
from vlmbatch.storage import without_secrets
from vlmbatch.tasks import PLACEHOLDERS, Ask, Task

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export


class Hub(Trl):
    """DEST holds what is uploaded; without ``repo``, nothing is."""

    name = "hub"
    about = "the same with a data set card, uploaded to the Hub (--format-arg repo=OWNER/NAME)"
    images = (ImageMode.EMBED,)
    split_names: ClassVar[Mapping[str, str]] = {}  # the card names their files
    options: ClassVar[Mapping[str, str]] = {
        **Trl.options,
        "repo": "OWNER/NAME on the Hub; without it everything is made ready in DEST",
        "private": "true: only you see it (default), or false",
        "license": "for the card, as the Hub names it (cc-by-4.0)",
    }

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        given = export.options.get("private", "true")
        if given not in ("true", "false"):
            raise UsageError(f"private={given} is neither true nor false", hint="leave it out")
        if self.repo is not None:
            _api(self.repo)

    @property
    def repo(self) -> str | None:
        return self.export.options.get("repo")

    def sink(self, piece: Piece, split: str) -> Sink:
        return ParquetSink(piece.file(f"data/{split}-{piece.number:05d}.parquet"), self.schema())

    def finish(self) -> None:
        card = self._card().encode()
        self.export.destination.write("README.md", lambda file: file.write(card))
        if self.repo is not None:
            self._upload(self.repo)

    def _upload(self, repo: str) -> None:
        api, place = _api(repo), self.export.place
        private = self.export.options.get("private", "true") == "true"
        try:
            api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                repo_type="dataset",
                folder_path=place,
                allow_patterns=["README.md", "data/*.parquet"],
                commit_message="Answers of a vision-language model, exported by vlmbatch",
            )
        except Exception as error:  # the HTTP library, and so its errors, change between versions
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            again = shlex.join(["hf", "upload-large-folder", repo, str(place), "--type=dataset"])
            raise RunStopped(
                f"cannot upload to {repo} on the Hub: {reason}",
                hint=f"everything is in {place}: run the same again, or {again}",
            ) from None

    def _card(self) -> str:
        """README.md: what the Hub reads, then what people do."""
        run, splits = self.export.source.run_file, self.export.splits.names
        files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
        head: dict[str, Any] = {
            "configs": [{"config_name": "default", "data_files": files}],
            "tags": ["synthetic", "vlmbatch", "image"],
        }
        if "license" in self.export.options:
            head["license"] = self.export.options["license"]
        asked = "\n".join(f"| {name} | {_shown(self._asked(task))} |" for name, task in self._tasks)
        return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {self.repo or self.export.place.name}

The answers in `messages` were given by a model, not by people.

| | |
| --- | --- |
| model | `{self.export.model}` |
| images from | {", ".join(f"`{_bare(each)}`" for each in run.spec.manifest)} |
| run | `{run.run}`, {run.created} |
| only results with | {_shown("; ".join(["an answer", *self._conditions]))} |

| task | asked |
| --- | --- |
{asked}

```python
datasets.load_dataset({(self.repo or ".")!r})  # images, messages: as TRL's SFTTrainer takes them
```
"""

    @property
    def _conditions(self) -> list[str]:
        """What else was asked of results, in the words of the options."""
        asked = self.export.settings
        found = [] if asked.where is None else [f"`{asked.where}`"]
        found += [] if asked.min_chars is None else [f"{asked.min_chars} characters or more"]
        found += [] if asked.max_chars is None else [f"{asked.max_chars} characters or fewer"]
        found += [f"no {each}" for each in asked.drop or ()]
        if asked.max_per_label is not None:
            found.append(f"{asked.max_per_label} of each label at most")
        return found

    @property
    def _tasks(self) -> list[tuple[str, Task]]:
        return list(self.export.source.tasks.items())

    def _asked(self, task: Task) -> str:
        if task.spec.prompt is not None:
            return task.spec.prompt
        ask = PLACEHOLDERS.get(task.kind) or Ask(task.kind, style=task.spec.style)
        return said(self.export.source.family, ask)


def _shown(text: str) -> str:
    """In a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _bare(name: str) -> str:
    """A local path says nothing to others, and something about its owner."""
    return without_secrets(name) if "://" in name else name.rstrip("/").rpartition("/")[2]


def _api(repo: str) -> Any:
    """The Hub's client. Raises UsageError where there is none, or the name is none."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise UsageError(
            "an upload to the Hub needs the library huggingface_hub",
            hint="pip install 'vlmbatch[hub]'",
        ) from None
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UsageError(f"repo={repo!r} is no name on the Hub", hint="OWNER/NAME") from None
    return HfApi()


FORMAT = Hub
