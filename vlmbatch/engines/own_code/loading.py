"""A checkpoint's model, tokenizer and processor, made by its own code, at its pinned revision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmbatch.engines.transformers import Source, _hub_answers
from vlmbatch.errors import EngineStartError


@dataclass(frozen=True)
class Checkpoint:
    """Where it is, and in what form it is wanted. The libraries may be years old here: an
    environment of the model's own has the versions that its code was written for."""

    source: Source
    dtype: str
    device: str
    scratch: Path
    """A folder for what is needed only while everything is loaded."""

    @cached_property
    def path(self) -> str:
        """What its files are loaded from: its folder or Hub id.

        Older versions of transformers cannot import code from a name with a dot (Phi-3.5): then
        the Hub's local folder of the commit, or a link to the folder.
        """
        from huggingface_hub import snapshot_download
        from transformers import dynamic_module_utils

        source, name = self.source, Path(self.source.model).name
        if "." not in name or hasattr(dynamic_module_utils, "_sanitize_module_name"):
            return source.model
        if not source.is_folder:
            offline = self.options["local_files_only"]
            return str(
                snapshot_download(source.model, revision=source.revision, local_files_only=offline)
            )
        link = self.scratch / name.replace(".", "_")
        link.symlink_to(Path(source.model).absolute(), target_is_directory=True)
        return str(link)

    def model(self, auto: str = "AutoModelForCausalLM", **more: Any) -> Any:
        """The model, ready to answer. Raises EngineStartError where weights are missing."""
        import torch
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        new = int(transformers.__version__.partition(".")[0]) >= 5
        more["dtype" if new else "torch_dtype"] = getattr(torch, self.dtype)
        found = getattr(transformers, auto).from_pretrained(
            self.path, output_loading_info=True, **self.options, **more
        )
        model, report = found if isinstance(found, tuple) else (found, {"missing_keys": ()})
        parameters = {name for name, _ in model.named_parameters()}
        if missing := sorted(parameters.intersection(report["missing_keys"])):
            raise EngineStartError(
                f"{self.source} lacks {len(missing)} weights that the model needs: {missing[0]}",
                hint="the checkpoint is incomplete, or made for another version of its code",
            )
        return model.eval().to(self.device)

    def tokenizer(self, of: str | None = None, **more: Any) -> Any:
        """Its own tokenizer, or the one of another checkpoint, which brings no code."""
        from transformers import AutoTokenizer

        if of is None:
            return AutoTokenizer.from_pretrained(self.path, **self.options, **more)
        other = Source(of, None, trust_remote_code=False)
        offline = other.is_folder or not _hub_answers(other)
        return AutoTokenizer.from_pretrained(of, local_files_only=offline, **more)

    def processor(self, **more: Any) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self.path, **self.options, **more)

    @cached_property
    def options(self) -> dict[str, Any]:
        source = self.source
        return {
            "revision": None if source.is_folder else source.revision,
            "code_revision": None if source.is_folder else source.revision,
            "trust_remote_code": True,
            "local_files_only": source.is_folder or not _hub_answers(source),
        }

    def placed(self, value: Any) -> Any:
        """A tensor on the device, floating point in the model's dtype; all else as it is."""
        import torch

        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            return value.to(self.device, getattr(torch, self.dtype))
        return value.to(self.device)
