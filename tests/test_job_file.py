"""Job specs as files: bases, variables, dates, and what of them is never stored."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import OURS, assert_whole, quiz, run_command, run_json
from vlmbatch.errors import UsageError
from vlmbatch.job import JobSpec
from vlmbatch.job_file import load_job
from vlmbatch.placeholders import PLACES, PROMPTS, Filler, by_name, by_value

DAY = datetime(2026, 3, 1, 7, 5, tzinfo=UTC)
LEAST = "manifest: m.parquet\noutput: out\nmodel: demo\n"


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def filled(text: str, key: str = "output", **environment: str) -> str:
    filler = Filler(DAY, environment)
    value = filler.fill({key: text})[key]
    assert filler.problems == []
    assert isinstance(value, str)
    return value


def problem(text: str, **environment: str) -> str:
    filler = Filler(DAY, environment)
    assert filler.fill({"output": text}) == {"output": text}
    ((address, said),) = filler.problems
    assert address == ("output",)
    return said


def problems_of(path: str, **more: object) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load_job(path, environment={}, **more)  # type: ignore[arg-type]
    first, *lines = caught.value.message.split("\n  ")
    assert first == f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in {path}"
    return lines


# placeholders


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("{date}", "2026-03-01"),
        ("out/{date-1d}", "out/2026-02-28"),
        ("{date+7d}", "2026-03-08"),
        ("{date:%Y/%m/%d}", "2026/03/01"),
        ("s3://b/{date-1d:%Y%m%d}-{date:%H}.parquet", "s3://b/20260228-07.parquet"),
        ("{date:week %V}", "week 09"),
        ("${{date}}", "2026-03-01"),
        ("${BUCKET}/{date}", "photos/2026-03-01"),
        ("${BUCKET:-other}", "photos"),
        ("${NOWHERE:-s3://other}/x", "s3://other/x"),
        ("${EMPTY}x", "x"),
        ("${TRICK}", "${BUCKET}{date}"),
        ("shard-{000..012}-{a,b}.parquet", "shard-{000..012}-{a,b}.parquet"),
        ("{dates}/{ date }/{{ title }}/{}", "{dates}/{ date }/{{ title }}/{}"),
        ("$BUCKET $$ 100%", "$BUCKET $$ 100%"),
    ],
)
def test_in_places_dates_and_variables_are_filled_in_once(written: str, means: str) -> None:
    assert filled(written, BUCKET="photos", EMPTY="", TRICK="${BUCKET}{date}") == means


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("${NOWHERE}/x", "the environment variable NOWHERE is not set"),
        ("${two words}", "${two words} names no variable: ${NAME} or ${NAME:-default}"),
        ("{date-1}", "{date-1} is no date: as in {date}, {date-1d}, {date:%Y/%m}"),
        ("{date-1w}", "{date-1w} is no date: as in {date}, {date-1d}, {date:%Y/%m}"),
        ("{date+99999999d}", "{date+99999999d} is no day that a calendar has"),
        ("{date-999999999999999d}", "{date-999999999999999d} is no day that a calendar has"),
    ],
)
def test_a_placeholder_that_means_nothing_is_a_problem(written: str, said: str) -> None:
    assert problem(written) == said


def test_in_prompts_only_dollar_and_two_braces_are_a_date() -> None:
    text = "{date} ${HOME} {{ date }} {{ title }} ${{date}} ${{ date-1d:%d.%m.%Y }}"
    means = "{date} ${HOME} {{ date }} {{ title }} 2026-03-01 28.02.2026"
    spec = {
        "system": text,
        "tasks": [{"name": "x", "prompt": text, "question": text, "choices": [text]}],
        "carry": [text],
    }
    found = Filler(DAY, {}).fill(spec)
    task = found["tasks"][0]
    assert (found["system"], task["prompt"], task["question"]) == (means, means, means)
    assert (found["carry"], task["choices"]) == ([text], [text])


@given(st.text(alphabet="ab/{}$:-+% dte.", max_size=30))
def test_text_without_a_placeholder_stays_as_it_is(text: str) -> None:
    if "{date" not in text and "${" not in text:
        assert filled(text) == text


def test_the_keys_with_placeholders_are_keys_of_a_spec() -> None:
    schema = JobSpec.model_json_schema()
    sections = {
        "engine": schema["$defs"]["EngineSpec"],
        "tasks": schema["$defs"]["TaskSpec"],
    }
    for *section, key in (*PLACES, *PROMPTS):
        assert key in (sections[section[0]] if section else schema)["properties"]


@given(
    st.dictionaries(st.sampled_from(["A", "B_1", "AB"]), st.text("AB_1/", max_size=4)),
    st.text("AB_1/ -", max_size=20),
)
def test_what_is_stored_by_name_is_read_as_it_was(variables: dict[str, str], text: str) -> None:
    assert by_value(by_name(text, variables), variables) == text


def test_the_longest_value_is_stored_by_its_name() -> None:
    variables = {"HOST": "host", "ADDRESS": "host:80", "EMPTY": ""}
    assert by_name("http://host:80/host", variables) == "http://${ADDRESS}/${HOST}"
    assert by_value("http://${ADDRESS}/${HOST}${OTHER}", variables) == "http://host:80/host${OTHER}"


# files


def test_a_spec_extends_another_section_by_section(tmp_path: Path) -> None:
    write(tmp_path, "bases/root.yaml", LEAST + "sampling: {max_tokens: 9, seed: 1}\nworkers: 2\n")
    write(
        tmp_path,
        "bases/team.yaml",
        "extends: root.yaml\nsampling: {seed: 2}\n"
        "tasks: [{name: poem, prompt: a poem, json_schema: poem.json}]\n",
    )
    write(tmp_path, "bases/poem.json", '{"type": "object"}')
    path = write(tmp_path, "night.yaml", "extends: bases/team.yaml\noutput: night\n")
    spec = load_job(path, environment={}, settings={"sampling.top_p": "0.5"})
    assert (spec.manifest, spec.output, spec.workers) == (["m.parquet"], "night", 2)
    assert (spec.sampling.max_tokens, spec.sampling.seed, spec.sampling.top_p) == (9, 2, 0.5)
    assert spec.tasks[0].json_schema == {"type": "object"}
    assert spec.extends is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: gone.yaml", "cannot read the job spec {0}/gone.yaml, which {0}/a.yaml extends"),
        ("extends: b.yaml", "goes round in a circle: {0}/a.yaml -> {0}/b.yaml -> {0}/./a.yaml"),
        ("extends: [b.yaml]", "{0}/a.yaml: extends is the path of one spec"),
        ("output: {date}/x", "{0}/a.yaml is not YAML: "),
    ],
)
def test_a_spec_that_cannot_be_read_says_why(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, "b.yaml", "extends: ./a.yaml")
    path = write(tmp_path, "a.yaml", text)
    with pytest.raises(UsageError) as caught:
        load_job(path, environment={})
    assert said.format(tmp_path) in str(caught.value)
    if "YAML" in said:
        assert "needs quotes, as in output: '{date}/captions'" in str(caught.value)


def test_all_problems_are_told_at_once_and_those_of_a_base_name_its_file(tmp_path: Path) -> None:
    base = write(
        tmp_path,
        "base.yaml",
        "manifest: '${IN}/x'\nmodel: demo\nsampling: {temprature: 1}\nexclude: '${OVERRIDDEN}'\n"
        "engine: {base_url: 'http://${HOST}/v1'}\ntimezon: UTC\n",
    )
    path = write(
        tmp_path,
        "night.yaml",
        "extends: base.yaml\noutput: {date}\ntimezone: Moon/North\nexclude: []\n"
        "tasks: [{name: x, prompt: y, json_schema: 'gone-{date-1}.json'}]\nlimit: many\n",
    )
    assert problems_of(path) == [
        f"the environment variable IN is not set @ manifest (in {base})",
        f"the environment variable HOST is not set @ engine.base_url (in {base})",
        "a text that begins with { needs quotes, as in '{date}' @ output",
        "{date-1} is no date: as in {date}, {date-1d}, {date:%Y/%m} @ tasks.0.json_schema",
        "no time zone 'Moon/North' is known here: as in Europe/Berlin (pip install tzdata, on a "
        "machine without zones), got 'Moon/North' @ timezone",
        "expected a whole number, got 'many' @ limit",
        f"unknown key 'temprature' (did you mean 'temperature'?) @ sampling (in {base})",
        f"unknown key 'timezon' (did you mean 'timezone'?) (in {base})",
    ]


def test_options_win_and_stand_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", LEAST + "include: '${NOWHERE}'\n")
    options = {"output": "${HOME}/{date}", "include": ["*.jpg"], "workers": 3}
    spec = load_job(path, options=options, environment={}, settings={"limit": "7"})
    assert (spec.output, spec.include, spec.workers, spec.limit) == (
        "${HOME}/{date}",
        ["*.jpg"],
        3,
        7,
    )
    assert type(spec.output) is str
    settings = {"output": "${BUCKET}/{date:%Y}"}
    spec = load_job(path, options=options, settings=settings, environment={"BUCKET": "s3://b"})
    assert spec.output == f"s3://b/{datetime.now(UTC):%Y}"
    assert spec.variables == ("BUCKET",)


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Niue"])
def test_the_day_is_that_of_the_time_zone_or_of_the_date_option(tmp_path: Path, zone: str) -> None:
    from zoneinfo import ZoneInfo

    path = write(tmp_path, "a.yaml", LEAST.replace(": out", ": '{date}'") + f"timezone: {zone}\n")
    days = [datetime.now(ZoneInfo(zone)).date().isoformat()]
    found = load_job(path, environment={}).output
    days.append(datetime.now(ZoneInfo(zone)).date().isoformat())
    assert found in days
    assert load_job(path, environment={}, date="2024-02-29").output == "2024-02-29"
    with pytest.raises(UsageError, match=r"--date 30\.2\.: expected a day such as 2026-11-21"):
        load_job(path, environment={}, date="30.2.")


def test_a_date_without_a_spec_is_refused(tmp_path: Path) -> None:
    ended = run_command("run", tmp_path / "m.parquet", "--date", "2026-11-21")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "--date is for the {date} of a job spec" in ended.stderr


# runs

SECRET = "hush-7f3a9c"


def test_values_of_variables_are_nowhere_in_the_output_and_retries_find_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a folder may be a secret. What each process needs, it has from its environment."""
    made = quiz(tmp_path / f"in-{SECRET}", 12)
    monkeypatch.setenv("IN_FOLDER", f"in-{SECRET}")
    spec = {
        "manifest": f"{tmp_path}/${{IN_FOLDER}}/quiz.parquet",
        "output": f"{tmp_path}/${{NAME:-out}}/{{date}}",
        "model": "demo",
        "allow_roots": [f"{tmp_path}/${{IN_FOLDER}}"],
        "tasks": ["vqa"],
        "engine": {"name": "echo", "args": {"reply_from": "answers"}},
    }
    path = write(tmp_path, "night.yaml", json.dumps(spec))
    words = ("run", "--job", path, "--date", "2026-11-21", "--json")
    half = run_command(*words, "--limit", "5")
    assert half.exit_code == 0, half
    ended = run_command(*words)
    assert ended.exit_code == 0, ended
    assert (ended.json["ok"], ended.json["skipped"]) == (7, 5)
    output = tmp_path / "out" / "2026-11-21"
    assert_whole(output, made.answers, ids=made.ids)

    stored = run_json(output)
    assert stored["variables"] == ["IN_FOLDER"]
    assert stored["job"]["manifest"] == [f"{tmp_path}/${{IN_FOLDER}}/quiz.parquet"]
    assert stored["manifest"]["folder"] == f"{tmp_path}/${{IN_FOLDER}}"
    for file in (output / OURS).rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    for said in (half, ended):
        assert SECRET not in said.stdout + said.stderr

    assert run_command("retry", output).exit_code == 0
    monkeypatch.delenv("IN_FOLDER")
    refused = run_command("retry", output)
    assert refused.exit_code == 2, refused
    assert "names environment variables that are not set: IN_FOLDER" in refused.stderr
    assert run_command("status", output).exit_code == 0
    missing = run_command(*words)
    assert missing.exit_code == 2, missing
    assert "the environment variable IN_FOLDER is not set @ manifest" in missing.stderr


def test_what_goes_wrong_is_said_without_the_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", f"{tmp_path}/{SECRET}")
    path = write(tmp_path, "a.yaml", LEAST.replace("m.parquet", "'${PLACE}/gone.parquet'"))
    ended = run_command("run", "--job", path)
    assert ended.exit_code == 2, ended
    assert "no manifest ${PLACE}/gone.parquet" in ended.stderr
    assert SECRET not in ended.stderr


def test_the_address_of_a_hook_may_be_a_variable(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("manifest: m.parquet\noutput: o\nmodel: demo\nnotify_url: ${HOOK}\n")
    spec = load_job(str(job), environment={"HOOK": "https://host/secret"})
    assert spec.notify_url == "https://host/secret"
    assert "secret" not in str(spec.model_dump())
    with pytest.raises(UsageError, match="HOOK"):
        load_job(str(job), environment={})
