"""Answers that must have a form: a JSON Schema, one of some choices, or a regular expression.

Engines hold the model to it while it answers; whether the answer has the form is checked here in
any case, and its value goes to the ``json`` column.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from typing import Any

from vlmbatch.errors import ErrorCode, RequestFailed, Stage, UsageError, failed
from vlmbatch.job import TaskSpec
from vlmbatch.records import Structure

FORMS = {"json_schema": "--json-schema", "choices": "--choices", "regex": "--regex"}
"""The task's settings, and their options."""
WITH_BOXES = ("ground", "detect")

DIALECTS = (
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    *(f"http://json-schema.org/draft-0{number}/schema" for number in (7, 6, 4, 3)),
)
"""What ``$schema`` may name; the first one where it names none."""

_FENCE = "```"
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_MESSAGE_CHARS = 300


def structure_of(spec: TaskSpec) -> Structure | None:
    """What the task's answers must look like; None: anything. Raises UsageError."""
    asked = [name for name in FORMS if getattr(spec, name) is not None]
    if not asked:
        return None
    options = [FORMS[name] for name in asked]
    if len(asked) > 1:
        raise UsageError(
            f"task {spec.name!r} has {' and '.join(options)}: an answer has one form",
            hint="give one of them",
        )
    if spec.name in WITH_BOXES:
        raise UsageError(
            f"{options[0]} is not for -t {spec.name}: boxes have the form of the model's family",
            hint="ask for boxes of your own form with a task of your own: -t NAME --prompt TEXT",
        )
    if spec.json_schema is not None:
        return Structure(json_schema=_checked_schema(spec.name, spec.json_schema))
    if spec.choices is not None:
        return Structure(choices=_checked_choices(spec.name, spec.choices))
    return Structure(regex=_checked_regex(spec.name, spec.regex or ""))


def fitting(text: str, structure: Structure) -> str:
    """The answer's value as JSON text, for the ``json`` column.

    ``text`` is without special tokens. Whitespace and a Markdown fence around JSON are taken off;
    nothing else is repaired. Raises RequestFailed (schema_mismatch), and nothing else.
    """
    if structure.json_schema is not None:
        return _fitting_json(text, structure.json_schema)
    text = text.strip()
    if structure.choices and text not in structure.choices:
        raise _mismatch(f"{_shown(text)} is none of: {', '.join(structure.choices)}")
    if structure.regex is not None and re.fullmatch(structure.regex, text) is None:
        raise _mismatch(f"{_shown(text)} does not match {structure.regex}")
    return _as_json(text)


def _fitting_json(text: str, schema: str) -> str:
    from jsonschema.exceptions import best_match

    try:
        value = json.loads(
            _without_fence(text), parse_float=_finite, parse_constant=_refuse_constant
        )
        error = best_match(_validator(schema).iter_errors(value))
        written = _as_json(value)
    except RecursionError:
        raise _mismatch("it is nested too deeply") from None
    except json.JSONDecodeError as problem:
        raise _mismatch(f"not JSON: {problem.msg} at character {problem.pos}") from None
    except Exception as problem:
        # A stranger's data meets a user's schema: whatever comes of it is this answer's problem.
        raise _mismatch(f"it cannot be checked: {problem}") from None
    if error is not None:
        raise _mismatch(f"{error.json_path}: {error.message}")
    return written


def _without_fence(text: str) -> str:
    """What stands between ```json and ```, where the whole text is one fence."""
    text = text.strip()
    if len(text) < 2 * len(_FENCE) or not (text.startswith(_FENCE) and text.endswith(_FENCE)):
        return text
    inside = text[len(_FENCE) : -len(_FENCE)]
    return inside[4:] if inside[:4].lower() == "json" else inside


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _as_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no file can hold but as \ud800
        return json.dumps(value, allow_nan=False)
    return text


def _mismatch(message: str) -> RequestFailed:
    if len(message) > _MESSAGE_CHARS:
        message = f"{message[: _MESSAGE_CHARS - 3]}..."
    return failed(ErrorCode.SCHEMA_MISMATCH, Stage.PARSE, message)


def _shown(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else f"{text[:length]}...")


def _checked_choices(task: str, choices: list[str]) -> tuple[str, ...]:
    if not choices:
        raise UsageError(f"--choices of task {task!r} names nothing", hint="--choices yes,no")
    for choice in choices:
        if not choice or choice != choice.strip():
            problem = "has whitespace around it" if choice.strip() else "is empty"
            raise UsageError(f"--choices of task {task!r}: the choice {choice!r} {problem}")
        if choices.count(choice) > 1:
            raise UsageError(f"--choices of task {task!r}: {choice!r} is there twice")
    return tuple(choices)


def _checked_regex(task: str, regex: str) -> str:
    try:
        re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(
            f"--regex of task {task!r} is no regular expression: {error}: {_shown(regex)}"
        ) from None
    return regex


def _checked_schema(task: str, schema: dict[str, Any]) -> str:
    """The schema as JSON text."""
    from jsonschema.exceptions import SchemaError
    from referencing.exceptions import Unresolvable

    where = f"the JSON Schema of task {task!r}"
    if str(schema.get("$schema", DIALECTS[0])).removesuffix("#") not in DIALECTS:
        raise UsageError(
            f"{where} is of an unknown kind: $schema is {schema['$schema']!r}",
            hint=f"known: {', '.join(DIALECTS)}",
        )
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        if json.loads(text) != schema:
            raise UsageError(f"{where} is not JSON", hint="keys must be text: quote numbers")
        _validator(text).check_schema(schema)
        _check_references(schema)
    except SchemaError as error:
        raise UsageError(f"{where} is none: {error.json_path}: {error.message}") from None
    except Unresolvable as error:
        raise UsageError(
            f"{where} refers to {error.ref!r}, which is not in it",
            hint="nothing is fetched: put it under $defs, and refer to it as #/$defs/NAME",
        ) from None
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    return text


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    """By the draft that the schema names. With a registry of its own it fetches nothing."""
    from jsonschema.validators import validator_for
    from referencing.jsonschema import EMPTY_REGISTRY

    value = json.loads(schema)
    return validator_for({"$schema": DIALECTS[0], **value})(value, registry=EMPTY_REGISTRY)


def _check_references(schema: dict[str, Any]) -> None:
    """Raises Unresolvable for a reference that leads out of the schema, or nowhere."""
    from jsonschema_specifications import REGISTRY
    from referencing.jsonschema import specification_with

    root = specification_with(schema.get("$schema", DIALECTS[0])).create_resource(schema)
    check = [(root, REGISTRY.resolver_with_root(root))]
    while check:
        resource, resolver = check.pop()
        if isinstance(resource.contents, dict):
            for key in _REFERENCES:
                if isinstance(reference := resource.contents.get(key), str):
                    resolver.lookup(reference)
        check += [(part, resolver.in_subresource(part)) for part in resource.subresources()]
