"""Answers that must have a form: what fits goes to ``json``, the rest fails and says where."""

from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.harness import echo, read_results, run_json, vlmbatch, write_manifest
from tests.strategies import mutated
from vlmbatch.errors import ErrorCode, RequestFailed, Stage, UsageError
from vlmbatch.job import TaskSpec
from vlmbatch.records import Structure
from vlmbatch.structure import fitting, structure_of

COUNT = {
    "type": "object",
    "properties": {"count": {"type": "integer"}, "name": {"type": "string", "maxLength": 5}},
    "required": ["count"],
}
TREE = {"$ref": "#/$defs/tree", "$defs": {"tree": {"items": {"$ref": "#/$defs/tree"}}}}


def structure(**form: Any) -> Structure:
    found = structure_of(TaskSpec(name="caption", **form))
    assert found is not None
    return found


def refused(name: str = "caption", **form: Any) -> str:
    with pytest.raises(UsageError) as caught:
        structure_of(TaskSpec(name=name, **form))
    return str(caught.value)


def mismatch(text: str, **form: Any) -> str:
    with pytest.raises(RequestFailed) as caught:
        fitting(text, structure(**form))
    failure = caught.value.failure
    assert (failure.code, failure.stage) == (ErrorCode.SCHEMA_MISMATCH, Stage.PARSE)
    assert not failure.retryable
    return failure.message


# what a task may ask for


def test_a_task_without_a_form_takes_any_answer() -> None:
    assert structure_of(TaskSpec(name="caption")) is None
    assert structure_of(TaskSpec(name="detect", labels=["cat"])) is None


def test_an_answer_has_one_form() -> None:
    assert "has --json-schema and --regex" in refused(json_schema=COUNT, regex="a")


@pytest.mark.parametrize("name", ["ground", "detect"])
def test_boxes_have_the_form_of_their_family(name: str) -> None:
    assert f"--choices is not for -t {name}" in refused(name, choices=["a"])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "intger"}, "is none: $.type: 'intger'"),
        ({"properties": {"a": {"minimum": "x"}}}, "is none: $.properties.a.minimum: 'x'"),
        ({"pattern": "("}, "is none: $.pattern: '(' is not a 'regex'"),
        ({"$schema": "https://example.org/mine"}, "$schema is 'https://example.org/mine'"),
        ({"$schema": 3}, "$schema is 3"),
        ({"const": float("nan")}, "is not JSON"),
        ({"const": object()}, "is not JSON"),
        ({"enum": [{1: 2}]}, "keys must be text"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "which is not in it"),
        ({"items": {"$ref": "other.json"}}, "refers to 'other.json', which is not in it"),
    ],
)
def test_a_schema_that_is_none_is_refused_and_says_where(schema: Any, message: str) -> None:
    assert message in refused(json_schema=schema)


def test_a_deep_schema_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    assert "nested too deeply" in refused(json_schema=deep)


def test_nothing_is_fetched_for_a_schema() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        assert "nothing is fetched" in refused(json_schema={"$ref": address})
        hidden = {"$ref": "#/mine", "mine": {"allOf": [{"not": {"$ref": address}}]}}
        for where in ({"$ref": "#/x-mine", "x-mine": {"$ref": address}}, hidden):
            try:
                found = structure_of(TaskSpec(name="caption", json_schema=where))
            except UsageError:
                continue
            assert found is not None
            with pytest.raises(RequestFailed):
                fitting("{}", found)
        with pytest.raises(TimeoutError):
            server.accept()


def test_references_inside_the_schema_are_followed() -> None:
    own = {
        "$id": "http://example.org/a",
        "properties": {"x": {"$ref": "b"}, "$ref": {"type": "string"}},
        "$defs": {"b": {"$id": "b", "type": "integer"}},
    }
    assert fitting('{"x": 3, "$ref": "y"}', structure(json_schema=own)) == '{"x": 3, "$ref": "y"}'
    assert "$.x: 'y' is not of type 'integer'" in mismatch('{"x": "y"}', json_schema=own)
    draft7 = {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {}}}
    structure(json_schema={**draft7, "properties": {"x": {"$ref": "#/definitions/a"}}})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "names nothing"),
        (["a", ""], "the choice '' is empty"),
        (["a", " "], "the choice ' ' is empty"),
        (["a "], "the choice 'a ' has whitespace around it"),
        (["a", "b", "a"], "'a' is there twice"),
    ],
)
def test_choices_are_some_and_differ(choices: list[str], message: str) -> None:
    assert message in refused(choices=choices)


@pytest.mark.parametrize("regex", ["(", "*", "a{99999999999}", "(?P<x"])
def test_a_regular_expression_that_is_none_is_refused(regex: str) -> None:
    assert "is no regular expression" in refused(regex=regex)


# what fits


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"count":3}', '{"count": 3}'),
        (' \n{"name": "Zoë", "count": 3}\n', '{"name": "Zoë", "count": 3}'),
        ('```json\n{"count": 3}\n```', '{"count": 3}'),
        ('```\n{"count": 3}\n```\n', '{"count": 3}'),
        ('```JSON {"count": 3}```', '{"count": 3}'),
        ('{"count": 3, "name": "\\ud800"}', '{"count": 3, "name": "\\ud800"}'),
        ('{"count": 3, "name": "\ud83d\ude00"}', None),
    ],
)
def test_json_that_fits_is_kept_as_an_object(text: str, value: str | None) -> None:
    written = fitting(text, structure(json_schema=COUNT))
    assert json.loads(written)["count"] == 3
    written.encode()
    assert value is None or written == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"count": "three"}', "$.count: 'three' is not of type 'integer'"),
        ("{}", "$: 'count' is a required property"),
        ('{"count": 3, "name": "much too long"}', "$.name: 'much too long' is too long"),
        ("three", "not JSON: Expecting value at character 0"),
        ('{"count": 3,}', "not JSON: "),
        ("{'count': 3}", "not JSON: "),
        ('Here it is: ```json\n{"count": 3}\n```', "not JSON: "),
        ('```json\n{"count": 3}', "not JSON: "),
        ("", "not JSON: "),
        ("```", "not JSON: "),
        ("```json```", "not JSON: "),
        ('{"count": NaN}', "NaN is not JSON"),
        ('{"count": -Infinity}', "-Infinity is not JSON"),
        ('{"count": 1e999}', "1e999 is too large"),
        ('{"count": ' + "9" * 5000 + "}", "it cannot be checked: "),
        ("[" * 100_000, "nested too deeply"),
        ('{"count": ' * 100_000, "nested too deeply"),
    ],
)
def test_json_that_does_not_fit_says_what_and_where(text: str, message: str) -> None:
    said = mismatch(text, json_schema=COUNT)
    assert message in said
    assert len(said) <= 300


def test_choices_and_regular_expressions_give_the_text() -> None:
    assert fitting(" yes\n", structure(choices=["yes", "no"])) == '"yes"'
    assert mismatch("Yes", choices=["yes", "no"]) == "'Yes' is none of: yes, no"
    assert fitting("12 km", structure(regex=r"\d+ (km|m)")) == '"12 km"'
    assert mismatch("12 km!", regex=r"\d+ km") == r"'12 km!' does not match \d+ km"
    assert fitting('say "ü"', structure(regex=".*")) == '"say \\"ü\\""'


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FORMS: list[dict[str, Any]] = [
    {"json_schema": COUNT},
    {"json_schema": TREE},
    {"json_schema": {"multipleOf": 0.1, "uniqueItems": True, "pattern": "^a", "maxLength": 3}},
    {"json_schema": {"unevaluatedProperties": False, "dependentRequired": {"a": ["b"]}}},
    {"json_schema": {"$ref": "#"}},
    {"choices": ["a", "b"]},
    {"regex": "a+b?"},
]
FENCED = JSON.map(json.dumps).map(lambda text: f"```json\n{text}\n```")


@examples(max_examples=300)
@given(
    st.sampled_from(FORMS), st.text() | JSON.map(json.dumps) | mutated(FENCED | st.just("[1e5]"))
)
def test_whatever_the_text_is_it_fits_or_fails(form: dict[str, Any], text: str) -> None:
    written, code = "", None
    try:
        written = fitting(text, structure(**form))
    except RequestFailed as error:
        code = error.failure.code
    assert code is (None if written else ErrorCode.SCHEMA_MISMATCH)
    written.encode()
    if written:
        json.loads(written, parse_constant=pytest.fail)


# runs


REPLIES = ['{"count": 3}', '```json\n{"count": 4}\n```', '{"count": "x"}', "no idea"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "count.json").write_text(json.dumps(COUNT))
    return write_manifest(tmp_path / "m.parquet", {"id": list("abcd"), "reply": REPLIES})


def words(manifest: Path, *options: str) -> list[str]:
    output = manifest.parent / "out"
    fixed = ["--max-failure-rate=1", "--json", f"--output={output}"]
    return ["run", str(manifest), *echo(reply_from="reply"), *fixed, *options]


def test_a_run_keeps_what_fits_and_fails_the_rest(manifest: Path) -> None:
    option = f"--json-schema=count={manifest.parent}/count.json"
    asked = ["-t", "count", "--prompt=count=How many?", "-t", "ocr", option]
    ended = vlmbatch(*words(manifest, *asked))
    assert ended.exit_code == 0, ended
    assert ended.json["failures"] == {"schema_mismatch": 2}
    found = read_results(manifest.parent / "out").to_pylist()
    assert [r["json"] for r in found] == ['{"count": 3}', None, '{"count": 4}', *[None] * 5]
    assert [r["text"] for r in found[:4:2]] == REPLIES[:2]
    assert [r["raw"] for r in found] == [reply for reply in REPLIES for _ in range(2)]
    assert found[4]["error"] == {
        "code": "schema_mismatch",
        "stage": "parse",
        "message": "$.count: 'x' is not of type 'integer'",
    }
    again = vlmbatch(*words(manifest, *asked))
    assert (again.exit_code, again.json["skipped"]) == (0, 4), again
    (manifest.parent / "count.json").write_text('{"type": "object"}')
    refused = vlmbatch(*words(manifest, *asked))
    assert refused.exit_code == 2, refused
    assert "tasks.count.json_schema: was {'type': 'object', 'properties'" in refused.stderr


def test_choices_and_expressions_of_several_tasks(manifest: Path) -> None:
    options = ["--choices", "caption=no idea, idea", "--regex", r"ocr=[^=]*\d.*"]
    ended = vlmbatch(*words(manifest, "-t", "caption", "-t", "ocr", *options))
    assert ended.exit_code == 0, ended
    found = read_results(manifest.parent / "out").to_pylist()
    assert [r["json"] for r in found if r["task"] == "caption"] == [*[None] * 3, '"no idea"']
    ocr = [r["json"] for r in found if r["task"] == "ocr"]
    assert ocr == [json.dumps('{"count": 3}'), None, None, None]
    assert run_json(manifest.parent / "out")["ask"]["tasks.caption.choices"] == ["no idea", "idea"]


@pytest.mark.parametrize("form", ["{type: object}", "../m.d/count.json"])
def test_a_job_spec_has_the_schema_or_names_its_file(manifest: Path, form: str) -> None:
    folder = manifest.parent / "m.d"
    folder.mkdir()
    (folder / "count.json").write_text('{"type": "object"}')
    job = folder / "job.yaml"
    job.write_text(
        f"model: demo\nmanifest: {manifest}\noutput: {manifest.parent}/out\n"
        f"engine: {{name: echo, args: {{reply_from: reply}}}}\nmax_failure_rate: 1\n"
        f"tasks: [{{name: caption, json_schema: {form}}}]\n"
    )
    ended = vlmbatch("run", "--job", job, "--json")
    assert ended.exit_code == 0, ended
    assert ended.json["ok"] == 3
    stored = run_json(manifest.parent / "out")["job"]["tasks"][0]["json_schema"]
    assert stored == {"type": "object"}


def test_a_form_that_cannot_be_asked_for_is_exit_code_2(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(manifest.parent)
    Path("list.json").write_text("[1]")
    Path("broken.json").write_text("{")
    Path("wrong.json").write_text('{"type": "thing"}')
    Path("job.yaml").write_text("manifest: x\ntasks: [{name: ocr, json_schema: gone.json}]")
    for options, message in {
        "--json-schema nowhere.json": "cannot read the JSON Schema nowhere.json: No such file",
        "--json-schema list.json": "list.json is no JSON Schema: it holds no object",
        "--json-schema broken.json": "broken.json is not JSON: Expecting property name",
        "--json-schema m.parquet": "m.parquet is not JSON",
        "--json-schema wrong.json": "the JSON Schema of task 'caption' is none: $.type: 'thing'",
        "--regex (": "--regex of task 'caption' is no regular expression",
        "--choices ,": "names nothing",
        "--choices a,a": "'a' is there twice",
        "--choices a --regex a": "has --choices and --regex",
        "-t caption -t ocr --regex a": "--regex 'a' does not say which task it is for",
        "--regex poem=a": "--regex is for a task 'poem' that is not asked",
        "-t detect --labels a --choices a": "--choices is not for -t detect",
        "-m demo --engine transformers --choices a": "cannot hold a model to a schema",
        "--job job.yaml": "cannot read the JSON Schema gone.json",
    }.items():
        engine = [] if "--engine" in options or "--job" in options else echo()
        ended = vlmbatch("run", "m.parquet", "-o", "out", *engine, *shlex.split(options))
        assert (ended.exit_code, ended.stdout) == (2, ""), (options, str(ended))
        assert message in ended.stderr, options
    assert not Path("out").exists()
