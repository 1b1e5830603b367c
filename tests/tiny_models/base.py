"""What the tiny checkpoints share: a tokenizer made on the spot, small numbers for configs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vlmbatch.errors import RequestFailed
from vlmbatch.families import ENTRIES
from vlmbatch.records import TaskKind
from vlmbatch.tasks import Ask

CONTEXT = 256

LONGER = 1024
"""The context of those that are asked in a whole conversation."""

_TEMPLATE = (
    "{% for message in messages %}USER{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}END{% endfor %}{% if add_generation_prompt %}ASSISTANT{% endif %}"
)


def template(user: str, image: str, end: str, assistant: str) -> str:
    """A chat template: what stands before and after a user's turn, for an image, and before the
    answer."""
    around = {"USER": user, "IMAGE": image, "END": end, "ASSISTANT": assistant}
    text = _TEMPLATE
    for name, words in around.items():
        text = text.replace(name, "{{ " + repr(words) + " }}")
    return text


def small(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """The numbers of a small language model with this tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": LONGER,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def small_vision(side: int, patch: int, **more: Any) -> dict[str, Any]:
    """The numbers of a small encoder of square images."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
        **more,
    }


def save(folder: Path, model: Any, processor: Any) -> Path:
    """As a published checkpoint lies in its folder."""
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def talking_tokenizer(specials: Sequence[str], **names: Any) -> Any:
    """A byte-level BPE to which the families' own words are few tokens."""
    return byte_tokenizer(specials, texts=spoken(), vocab_size=512 + len(specials), **names)


@cache
def spoken() -> tuple[str, ...]:
    """What families say around questions, often enough to be learnt."""
    texts = ["\n\n"] * 9
    for family in (entry.make({}) for entry in ENTRIES):
        texts.append(family.frame or "")
        for kind in TaskKind:
            with contextlib.suppress(RequestFailed):
                texts.append(family.word(Ask(kind, question="what?", labels=("what",))))
    return tuple(texts) * 2


def byte_tokenizer(
    specials: Sequence[str],
    *,
    texts: Sequence[str] = ("what is in this image? describe the red circle",),
    vocab_size: int = 300,
    **names: Any,
) -> Any:
    """A byte-level BPE, its merges learnt from the texts; the first three specials are pad, bos and
    eos. ``names``: of special tokens, as PreTrainedTokenizerFast takes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(list(texts), trainer)
    pad, bos, eos = specials[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, bos_token=bos, eos_token=eos, **names
    )
