"""A job spec is read as it was meant, or all that is wrong with it is said at once."""

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from vlmbatch.errors import FingerprintMismatch, UsageError
from vlmbatch.job import JobSpec, check_same_ask, parse_bytes, parse_seconds, spec_from

SHAPES = {"manifest": "shapes.parquet"}


def problems(**values: object) -> list[str]:
    with pytest.raises(UsageError) as caught:
        spec_from({**SHAPES, **values}, where="jobs/nightly.yaml")
    first, *lines = caught.value.message.split("\n  ")
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert first == f"{count} in jobs/nightly.yaml"
    return lines


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("512MiB", 512 * 2**20),
        ("512MB", 512 * 2**20),
        ("1G", 2**30),
        ("1.5 GiB", 3 * 2**29),
        (" 2t ", 2**41),
        ("4096k", 2**22),
        ("1048576", 2**20),
        ("7B", 7),
        (12, 12),
        (None, None),
    ],
)
def test_sizes_in_bytes(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("30s", 30), ("1.5 m", 90), ("30min", 1800), ("2h", 7200), (5, 5), (0.5, 0.5)],
)
def test_times_in_seconds(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1.2.3G", ".", "GiB", "5 apples", "-1", "1e9", "inf", "½"])
@pytest.mark.parametrize("parse", [parse_bytes, parse_seconds])
def test_other_texts_are_refused(parse, text):
    with pytest.raises(ValueError, match=r"expected a (size|time) such as"):
        parse(text)


@examples(max_examples=200)
@given(st.text(max_size=12))
def test_a_size_is_a_number_or_an_explained_error(text):
    for parse, kind in ((parse_bytes, int), (parse_seconds, float)):
        try:
            found = parse(text)
        except ValueError as error:
            found = kind(0) if str(error).startswith("expected a") else error
        assert isinstance(found, kind)


def test_all_problems_are_told_at_once_each_with_its_address():
    assert problems(
        sampling={"temprature": 1, "max_tokens": "many"},
        engine={"name": "vlm"},
        tasks=["caption", {"name": "vqa", "stile": "short"}],
        image_memory="a lot",
        carry=7,
    ) == [
        "expected a list, got 7 @ carry",
        "unknown key 'stile' (did you mean 'style'?) @ tasks.1",
        "expected 'auto', 'vllm', 'transformers', 'openai' or 'echo', got 'vlm' @ engine.name",
        "expected a whole number, got 'many' @ sampling.max_tokens",
        "unknown key 'temprature' (did you mean 'temperature'?) @ sampling",
        "expected a size such as 512MiB, got 'a lot' @ image_memory",
    ]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("workers", 0, "expected at least 1, got 0 @ workers"),
        ("workers", 1.5, "expected a whole number, got 1.5 @ workers"),
        ("max_failure_rate", 7, "expected at most 1, got 7 @ max_failure_rate"),
        ("max_failure_rate", "x", "expected a number, got 'x' @ max_failure_rate"),
        ("model", 3, "expected text, got 3 @ model"),
        ("trust_remote_code", "so", "expected true or false, got 'so' @ trust_remote_code"),
        ("engine", "echo", "expected keys with values, got 'echo' @ engine"),
        ("carry", {"a": 1}, "expected a list, got keys with values @ carry"),
        ("manifest", [], "expected at least one, got [] @ manifest"),
        ("stall_timeout", "soon", "expected a time such as 90s, 30min or 2h, got 'soon'"),
        ("wrkers", 2, "unknown key 'wrkers' (did you mean 'workers'?)"),
        ("zzz", 2, "unknown key 'zzz'"),
    ],
)
def test_a_problem_says_what_was_expected_and_what_was_found(key, value, said):
    (line,) = problems(**{key: value})
    assert line.startswith(said)


def test_a_missing_key_is_named():
    with pytest.raises(UsageError, match="missing key 'manifest'"):
        spec_from({}, where="the command line")
    assert problems(tasks=[{"prompt": "x"}]) == ["missing key 'name' @ tasks.0"]


def test_a_long_value_is_cut_in_the_message():
    (line,) = problems(workers="9" * 5000)
    assert len(line) < 120


def test_single_values_stand_for_lists():
    spec = spec_from({**SHAPES, "tasks": "ocr"}, where="here")
    assert spec.manifest == ["shapes.parquet"]
    assert [task.name for task in spec.tasks] == ["ocr"]
    mixed = spec_from({**SHAPES, "tasks": ["ocr", {"name": "vqa", "question": "?"}]}, where="here")
    assert [(task.name, task.question) for task in mixed.tasks] == [("ocr", None), ("vqa", "?")]


def test_a_resolved_job_survives_run_json():
    spec = spec_from(
        {**SHAPES, "tasks": ["caption"], "image_memory": "2G", "stall_timeout": "2min"},
        where="here",
    )
    again = JobSpec.model_validate(spec.model_dump())
    assert again == spec
    assert (again.image_memory, again.stall_timeout) == (2**31, 120)


def test_the_same_ask_is_accepted():
    check_same_ask({"a": 1, "b": [1]}, {"b": [1], "a": 1}, retry_with="unused")


def test_another_ask_is_refused_field_by_field_with_the_command_to_use():
    with pytest.raises(FingerprintMismatch) as caught:
        check_same_ask(
            {"model": "demo a1", "system": None, "gone": 1, "same": 3},
            {"model": "demo b2", "system": "s" * 500, "new": True, "same": 3},
            retry_with="vlmbatch run shapes.parquet -o shapes-2",
        )
    error = caught.value
    first, gone, model, new, system = error.message.split("\n  ")
    assert first == "this output holds answers to another question; these changed:"
    assert gone == "gone: was 1, now None"
    assert model == "model: was 'demo a1', now 'demo b2'"
    assert new == "new: was None, now True"
    assert system.startswith("system: was None, now 'sss")
    assert len(system) < 200
    assert "vlmbatch run shapes.parquet -o shapes-2" in error.hint
    assert "--overwrite" in error.hint
    assert error.exit_code == 2
