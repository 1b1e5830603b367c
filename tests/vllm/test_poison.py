"""A row that kills the engine each time it is computed, among rows that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import picture, read_results, run_command, run_json, write_manifest
from tests.vllm.common import ENGINE, worker_logs
from tests.vllm.poison import MARKER

ROWS, POISON = 200, 120
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(700)
def test_a_row_that_kills_the_engine_is_found_and_the_others_are_answered(tmp_path: Path) -> None:
    """Suspects are only the requests that the engine had, and eight starts are enough."""
    questions = ["what is the color of the shape?"] * ROWS
    questions[POISON] = f"is it {MARKER}?"
    images = [picture(64, 64, f"#{i % 256:02x}4060") for i in range(ROWS)]
    manifest = write_manifest(tmp_path / "m.parquet", {"image": images, "question": questions})
    output = tmp_path / "out"
    poison = "logits_processors=tests.vllm.poison:Poison"
    words = ("run", manifest, "-t", "vqa", *ENGINE, "--engine-arg", poison, "-o", output)
    run = run_command(*words, "--max-tokens", "8", "--json", folder=REPOSITORY, seconds=600)
    assert run.exit_code == 0, run
    summary = run.json
    results = read_results(output).select(["row", "status", "error"]).to_pylist()
    assert [each["row"] for each in results] == list(range(ROWS))
    failed = {each["row"]: each["error"]["code"] for each in results if each["error"]}
    assert failed == {POISON: "engine_crash"}
    starts = len(worker_logs(output))
    assert starts == summary["worker_deaths"] + 1
    assert starts <= 8
    # One by one, in the careful starts, run only those that the engine had at a death.
    in_flight = 32 + 16
    computed = summary["engine_counters"]["prompts"]
    assert computed <= ROWS + 3 * in_flight
    assert run_json(output)["epoch"] == 1
