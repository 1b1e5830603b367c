"""Chat completions on the wire: a request as a body, an answer or a refusal as ours. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from vlmbatch.errors import ErrorCode, RequestFailed, Stage, UsageError, failed
from vlmbatch.records import IMAGE, Completion, Request, Sampling, Structure

DIALECTS = ("auto", "vllm", "openai")
"""``vllm`` has fields that the OpenAI API does not have; ``auto`` asks who owns the models."""

LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")

_TOO_LONG = re.compile(
    # OpenAI and vLLM; vLLM's engine; SGLang; llama.cpp; others
    r"maximum context length|maximum model length|longer than the model's context"
    r"|context size|context window|context_length|prompt is too long",
    re.IGNORECASE,
)


def check_dialect(dialect: str, sampling: Sampling, structure: Structure | None) -> None:
    """Raises UsageError for something that only vLLM's dialect can say."""
    if dialect == "vllm":
        return
    wanted = None
    if sampling.min_tokens:
        wanted = "min_tokens"
    elif sampling.repetition_penalty != 1.0:
        wanted = "repetition_penalty"
    elif structure is not None and structure.choices:
        wanted = "choices"
    elif structure is not None and structure.regex is not None:
        wanted = "a regex"
    if wanted is not None:
        raise UsageError(
            f"{wanted} cannot be asked of this endpoint: the OpenAI API has no such thing",
            hint="leave it out, or, if this is a vLLM server behind another name, add "
            "--engine-arg dialect=vllm",
        )


def body_of(
    request: Request,
    urls: Sequence[str],
    *,
    model: str,
    dialect: str,
    length_field: str,
    omit: Collection[str] = (),
) -> dict[str, Any]:
    """The request's JSON; only fields that differ from what an endpoint does by itself, and none
    of ``omit``.

    Images stand before the text, as models were trained. Families read special tokens, so vLLM is
    told to keep them.
    """
    sampling = request.sampling
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}} for url in urls
    ]
    # An endpoint has its own template: of a whole prompt, it gets what is around the image.
    content.append({"type": "text", "text": request.prompt.replace(IMAGE, "")})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "temperature": sampling.temperature,
        length_field: sampling.max_tokens,
    }
    if sampling.top_p != 1.0:
        body["top_p"] = sampling.top_p
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if request.structure is not None and request.structure.json_schema is not None:
        schema = json.loads(request.structure.json_schema)
        form = {"name": "answer", "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    if dialect == "vllm":
        body |= _vllm_fields(sampling, request.structure)
    return {name: value for name, value in body.items() if name not in omit}


def _vllm_fields(sampling: Sampling, structure: Structure | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        # Said even where it is nothing special: a server's own defaults are those of the model's
        # generation_config.json.
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": sampling.repetition_penalty,
    }
    if sampling.min_tokens:
        fields["min_tokens"] = sampling.min_tokens
    if structure is not None and structure.choices:
        fields["structured_outputs"] = {"choice": list(structure.choices)}
    elif structure is not None and structure.regex is not None:
        fields["structured_outputs"] = {"regex": structure.regex}
    return fields


class Unreadable(Exception):
    """The endpoint said yes, and what came with it is no chat completion."""


class NoContent(Exception):
    """A chat completion without a text."""


def completion_of(text: str) -> Completion:
    """The answer in a response's text. Raises Unreadable, or NoContent with the reason."""
    try:
        answer = json.loads(text)
        choice = answer["choices"][0]
        message = choice["message"]
        content, finish = message.get("content"), choice.get("finish_reason")
        usage = answer.get("usage") or {}
        prompt_tokens = _count(usage.get("prompt_tokens"))
        completion_tokens = _count(usage.get("completion_tokens"))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Unreadable(text or "nothing") from None
    if not isinstance(content, str):
        raise NoContent(_why_no_content(message, finish))
    return Completion(
        content,
        finish if isinstance(finish, str) else "unknown",
        prompt_tokens,
        completion_tokens,
    )


def _count(value: object) -> int | None:
    """What no result column can hold is no count."""
    return value if isinstance(value, int) and 0 <= value < 2**31 else None


def _why_no_content(message: dict[str, Any], finish: object) -> str:
    if message.get("refusal"):
        return f"the model refused: {message['refusal']}"
    if finish == "length":
        return "the model used up its max_tokens before it answered (finish_reason length)"
    return f"the model answered without content (finish_reason {finish})"


def refusal(status: int, code: str | None, message: str) -> RequestFailed:
    """The failure of a request that the endpoint refused, and would refuse again."""
    too_long = code == "context_length_exceeded" or _TOO_LONG.search(message) is not None
    return failed(
        ErrorCode.PROMPT_TOO_LONG if too_long else ErrorCode.ENGINE_FAILED,
        Stage.GENERATE,
        f"the endpoint refused this request ({status}): {message}",
    )


def shortened(text: str, length: int = 400) -> str:
    """In one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."
