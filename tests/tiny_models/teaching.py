"""Teaches a tiny checkpoint what to answer, so that a run of it has something to read."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

from vlmbatch.engines.transformers import Source, load
from vlmbatch.families import Family
from vlmbatch.records import Request

SURE = 0.6
"""The least probability of any token of an answer at which it is learnt: greedy decoding then says
just that."""


RATES = (1.0, 0.5, 0.25)
"""A rate at which it does not learn is lowered: how small models learn changes with every word."""


def teach(
    folder: Path,
    lessons: Sequence[tuple[Request, str]],
    *,
    family: Family,
    steps: int = 300,
    rate: float = 1e-2,
) -> None:
    """Train the checkpoint until it answers these requests so.

    It is given what the engine gives it, and each answer token by token, special tokens as such.
    """

    checkpoint = load(Source(str(folder), None, False), "float32", "cpu")
    checkpoint.frame = family.frame
    generation = (folder / "generation_config.json").read_bytes()
    groups: dict[str, list[tuple[Request, str]]] = {}
    for request, answer in lessons:
        groups.setdefault(checkpoint.group(request), []).append((request, answer))
    batches = [_batch(checkpoint, group) for group in groups.values()]
    model = checkpoint._model
    start = copy.deepcopy(model.state_dict())
    for slower in RATES:
        model.load_state_dict(start)
        if _learns(model, batches, steps, rate * slower):
            break
    else:
        raise AssertionError(f"{folder.name} did not learn its answers in {steps} steps")
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(generation)


def _learns(
    model: Any, batches: Sequence[tuple[dict[str, Any], Any]], steps: int, rate: float
) -> bool:
    import torch

    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        losses = torch.cat([_losses(model, *batch) for batch in batches])
        if losses.max() < -log(SURE):
            return True
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return False


def _batch(checkpoint: Any, lessons: Sequence[tuple[Request, str]]) -> tuple[dict[str, Any], Any]:
    """The model's input with the answers behind it, and the answers' ids, -100 after their end."""
    import torch

    tokenizer, kind = checkpoint._tokenizer, checkpoint._model.config.model_type
    tensors = dict(checkpoint.prepare([request for request, _ in lessons]).tensors)
    answers = [[*ids_of(tokenizer, text), tokenizer.eos_token_id] for _, text in lessons]
    longest = max(map(len, answers))
    labels = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in answers])
    if checkpoint._encodes:
        return {**tensors, "labels": labels}, labels
    more = {
        "input_ids": labels.clamp(min=0),
        "attention_mask": (labels >= 0).long(),
        # PaliGemma's prompt is read in both directions (0), what follows is not.
        "token_type_ids": torch.full_like(labels, kind == "paligemma"),
        "mm_token_type_ids": torch.zeros_like(labels),
        "image_embeds_position_mask": torch.zeros_like(labels),
    }
    for name, values in more.items():
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], values], dim=1)
    if "cross_attention_mask" in tensors:
        last = tensors["cross_attention_mask"][:, -1:].expand(-1, longest, -1, -1)
        tensors["cross_attention_mask"] = torch.cat([tensors["cross_attention_mask"], last], dim=1)
    return tensors, labels


def _losses(model: Any, tensors: dict[str, Any], labels: Any) -> Any:
    """One for each token of the answers."""
    from torch.nn.functional import cross_entropy

    logits = model(**tensors).logits
    if "labels" not in tensors:
        logits = logits[:, -labels.shape[1] - 1 : -1]
    real = labels >= 0
    return cross_entropy(logits[real].float(), labels[real], reduction="none")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The answer's tokens; a number inside of Fuyu's byte tokens is one."""
    if text.startswith("<0x00>"):
        return list(tokenizer.convert_tokens_to_ids(re.findall(r"<0x0\d>|\d+", text)))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
