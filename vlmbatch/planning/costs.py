"""Tokens, time and cost of what is to do, from a sample and what is known of the speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmbatch.planning.sample import Checked

BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Rates:
    """What the user knows of the speed and the price; images and tokens per second are those of one
    worker, tokens those of prompts and answers together."""

    images_per_second: float | None = None
    tokens_per_second: float | None = None
    price_per_gpu_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of a mean request of the sample, and of all that are to do."""

    image: float | None
    """By the family's rules; None: it does not know."""
    text: float
    """Without what the chat template adds."""
    text_by: str
    answer: float
    answer_by: str
    prompt_total: int | None
    answer_total: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Time and cost of what is to do. ``by``: where the rate is from."""

    seconds: float
    by: str
    gpu_hours: float
    cost: float | None


def tokens_of(
    found: Sequence[Checked],
    requests: int,
    model: Mapping[str, Any],
    answer: float,
    answer_by: str,
) -> Tokens | None:
    """Of so many requests. ``model``: as run.json keeps it; ``answer``: tokens of one answer."""
    good = [each for each in found if each.failure is None]
    asked = sum(each.requests for each in good)
    if not asked:
        return None
    count, text_by = _counter(model)
    text = sum(count(each.text) for each in good) / asked
    image: float | None = None
    if all(each.image_tokens is not None for each in good):
        image = sum((each.image_tokens or 0) * each.requests for each in good) / asked
    prompts = None if image is None else round((image + text) * requests)
    return Tokens(
        None if image is None else round(image, 1),
        round(text, 1),
        text_by,
        round(answer, 1),
        answer_by,
        prompts,
        round(answer * requests),
    )


def _counter(model: Mapping[str, Any]) -> tuple[Callable[[str], float], str]:
    """(the tokens of a text, how they are told): by the model's tokenizer where its file and the
    library are here."""
    path = _tokenizer_file(model)
    if path is not None:
        with suppress(Exception):  # not installed, or the file is of another version of it
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(path))
            return lambda text: len(tokenizer.encode(text).ids), "the model's tokenizer"
    return lambda text: len(text.encode()) / BYTES_PER_TOKEN, "a guess of 4 bytes each"


def _tokenizer_file(model: Mapping[str, Any]) -> Path | None:
    if not model["path"]:
        return None
    path = Path(model["path"]) / "tokenizer.json"
    if model["hub"]:
        with suppress(ImportError):
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(
                model["path"], "tokenizer.json", revision=model["revision"]
            )
            return Path(found) if isinstance(found, str) else None
    return path if path.is_file() else None


def estimate(
    rates: Rates,
    to_do: int,
    *,
    images_per_row: float,
    tokens: Tokens | None,
    workers: int,
    gpus: int,
    measured: tuple[float, str] | None,
) -> Estimate | None:
    """By the rates that are given, the slower of both; else by the measured one."""
    found: list[tuple[float, str]] = []
    if rates.images_per_second:
        seconds = to_do * images_per_row / rates.images_per_second / workers
        found.append((seconds, f"at {rates.images_per_second:g} images/s per worker"))
    if rates.tokens_per_second and tokens is not None and tokens.prompt_total is not None:
        seconds = (tokens.prompt_total + tokens.answer_total) / rates.tokens_per_second / workers
        found.append((seconds, f"at {rates.tokens_per_second:g} tokens/s per worker"))
    if not found and measured is not None:
        rate, by = measured
        found.append((to_do / rate, f"at {by}"))
    if not found:
        return None
    seconds, by = max(found)
    hours = seconds / 3600 * gpus
    price = rates.price_per_gpu_hour
    return Estimate(
        round(seconds, 1), by, round(hours, 3), None if price is None else round(hours * price, 2)
    )
