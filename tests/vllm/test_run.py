"""The command line with the vLLM engine: the answers of transformers, and answers of a form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.easy_vqa_data import write_manifest
from tests.harness import read_results, run_command
from tests.vllm.common import ENGINE

ROWS = 200
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "rectangle", "triangle"]}},
    "required": ["shape"],
    "additionalProperties": False,
}


@pytest.mark.timeout(600)
def test_the_same_answers_as_transformers(tmp_path: Path) -> None:
    """Greedy, float32: every difference is shown; rounding may flip a close decision."""
    manifest = write_manifest(tmp_path / "easy-vqa.parquet", rows=ROWS, with_questions=True)
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    words = ("run", manifest, "-t", "caption", "-t", "vqa")
    forms = (
        *("-t", "shape", "--prompt", "shape=what shape is in the image?"),
        *("--json-schema", f"shape={schema}"),
        *("-t", "guess", "--prompt", "guess=what is the color of the shape?"),
        *("--choices", "guess=red,green,blue"),
        *("-t", "code", "--prompt", "code=what shape is in the image?"),
        *("--regex", "code=[0-9]{2}"),
    )
    ours, theirs = tmp_path / "vllm", tmp_path / "transformers"
    run = run_command(*words, *forms, *ENGINE, "-o", ours, "--json", seconds=400)
    assert run.exit_code == 0, run
    other = run_command(
        *words, "--engine", "transformers", "-m", "demo", "-o", theirs, "--json", seconds=400
    )
    assert other.exit_code == 0, other

    columns = ["row", "task", "request", "question", "text", "json", "finish_reason"]
    found = read_results(ours).select(columns).to_pylist()
    expected = read_results(theirs).select(columns).to_pylist()
    asked = [each for each in found if each["task"] in ("caption", "vqa")]
    assert len(asked) == len(expected) >= 3 * ROWS
    differences = [(a, b) for a, b in zip(asked, expected, strict=True) if a != b]
    print(f"{len(asked) - len(differences)} of {len(asked)} answers are equal")
    for mine, its in differences:
        print(f"  row {mine['row']}, {mine['question']}: {mine['text']!r}, not {its['text']!r}")
    assert len(differences) <= 0.01 * len(asked), differences

    formed = [each for each in found if each["task"] in ("shape", "guess", "code")]
    assert len(formed) == 3 * ROWS
    for each in formed:
        value = json.loads(each["json"])
        match each["task"]:
            case "shape":
                assert value["shape"] in ("circle", "rectangle", "triangle")
            case "guess":
                assert value in ("red", "green", "blue")
            case "code":
                assert value.isdigit()
                assert len(value) == 2
    shapes = {
        each["row"]: json.loads(each["json"])["shape"] for each in formed if each["task"] == "shape"
    }
    captions = {each["row"]: each["text"] for each in asked if each["task"] == "caption"}
    assert sum(shapes[row] in captions[row] for row in shapes) >= 0.85 * ROWS
