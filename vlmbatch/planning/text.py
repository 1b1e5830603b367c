"""A plan for a person."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vlmbatch.planning import Plan
from vlmbatch.planning.costs import Estimate, Tokens
from vlmbatch.planning.sample import Sample
from vlmbatch.planning.trial import Tried

_WIDTH = 300


def describe(plan: Plan) -> str:
    lines = [f"plan: {plan.manifest} -> {plan.output}, nothing written"]
    for name, texts in _sections(plan):
        for number, text in enumerate(texts):
            lines.append(f"  {name if number == 0 else '':<9} {text}".rstrip())
    return "\n".join(lines)


def _sections(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    failed = f" ({plan.failed_earlier:,} of them failed)" if plan.failed_earlier else ""
    rows = f"{plan.rows:,}: {plan.to_do:,} to do, {plan.answered:,} answered earlier{failed}"
    workers = _number(plan.workers, f"{plan.executor} worker")
    tasks = " + ".join(plan.tasks)
    parts, commits = _number(plan.parts, "part"), _number(plan.commits, "commit")
    yield "rows", [rows]
    yield "requests", [f"{plan.requests.count:,} ({_COUNTED[plan.requests.counted]})"]
    yield "by", [f"{tasks} by {plan.model} ({plan.engine}, family {plan.family}), {workers}"]
    yield "output", [f"{parts} of up to {plan.part_rows:,} rows; about {commits}"]
    if plan.to_do:
        yield "sample", _about_sample(plan.sample)
        yield "tokens", _about_tokens(plan.tokens)
        yield "time", _about_time(plan.estimate)
        yield "prompts", _about_prompts(plan)
    if plan.tried is not None:
        yield "tried", _about_tried(plan.tried)


_COUNTED = {
    "exact": "each row gives as many",
    "counted": "counted row by row",
    "estimated": "estimated from the sample",
}


def _about_sample(found: Sample) -> list[str]:
    lines = [
        f"{found.rows:,} rows in {found.seconds:.1f} s: {found.failed:,} would fail "
        f"({found.failure_rate:.1%})"
    ]
    for code, problem in found.problems.items():
        lines.append(f"  {problem.rows:>4}  {code}")
        lines += [f"        {_short(example)}" for example in problem.examples]
    if found.images is not None:
        small, median, large = (
            f"{width}x{height}"
            for width, height in (found.images.smallest, found.images.median, found.images.largest)
        )
        lines.append(
            f"{found.images.count:,} images of {small} to {large} pixels, median {median}; "
            f"{found.images.shrunk:.0%} are larger than what the model sees"
        )
    return lines


def _about_tokens(tokens: Tokens | None) -> list[str]:
    if tokens is None:
        return ["not known: no sampled row can be asked about"]
    image = "an unknown number for images" if tokens.image is None else f"{tokens.image:,.0f} image"
    at_most = "at most " if tokens.answer_by == "at most" else ""
    by = "" if at_most else f" ({tokens.answer_by})"
    lines = [
        f"per request: {image} + {tokens.text:,.0f} text (by {tokens.text_by}; without the chat "
        f"template's) + {at_most}{tokens.answer:,.0f} answer{by}"
    ]
    prompts = "" if tokens.prompt_total is None else f"{tokens.prompt_total:,} of prompts + "
    lines.append(f"in all: {prompts}{at_most}{tokens.answer_total:,} of answers")
    return lines


def _about_time(found: Estimate | None) -> list[str]:
    if found is None:
        return ["not known: give --images-per-second or --tokens-per-second, or --try some rows"]
    minutes, seconds = divmod(round(found.seconds), 60)
    time = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} h {found.by}"
    cost = (
        "" if found.cost is None else f", {found.gpu_hours:,.2f} GPU hours, cost {found.cost:,.2f}"
    )
    return [f"{time}{cost}"]


def _about_prompts(plan: Plan) -> list[str]:
    lines = [
        "the whole prompt, <image> stands where the image goes"
        if plan.prompt_form == "whole"
        else "the user's turn; the image and the model's chat template are put around it"
    ]
    if plan.system:
        lines.append(f"system: {_short(plan.system)}")
    for each in plan.prompts:
        text = _short(each.prompt) if each.problem is None else f"(fails: {each.problem})"
        lines.append(f"row {each.row} {each.task}: {text}")
    return lines


def _about_tried(found: Tried) -> list[str]:
    rate = f"{found.seconds:.1f} s ({found.rows_per_second:g} rows/s)"
    rows = "row" if found.rows == 1 else f"{found.rows} rows"
    return [f"the first {rows}: {found.failed} failed, {rate}", *map(_answer, found.results)]


def _answer(result: dict[str, Any]) -> str:
    where = f"row {result['row']} {result['task']}"
    if result["question"] is not None:
        where += f" {_short(result['question'], 80)}"
    if result["status"] != "ok":
        return f"{where}: failed, {result['error']['code']}: {_short(result['error']['message'])}"
    found = result["json"] or result["text"]
    if result["boxes"] is not None:
        boxes = [{key: v for key, v in box.items() if v is not None} for box in result["boxes"]]
        found = json.dumps(boxes, ensure_ascii=False)
    return f"{where}: {_short(str(found))}"


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _short(text: str, width: int = _WIDTH) -> str:
    shown = text.replace("\n", "\\n")
    return shown if len(shown) <= width else f"{shown[: width - 3]}..."
