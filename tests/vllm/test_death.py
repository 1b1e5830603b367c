"""SIGKILL of the driver alone, then of the engine's core, in the middle of a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.harness import (
    OURS,
    Command,
    assert_adds_up,
    committed_rows,
    descendants,
    is_alive,
    picture,
    read_results,
    until,
    write_manifest,
)
from tests.vllm.common import ENGINE, core_process, engine_processes

ROWS = 3000


@pytest.mark.timeout(600)
def test_no_engine_outlives_its_driver_and_a_dead_engine_is_replaced(tmp_path: Path) -> None:
    images = [picture(64, 64, f"#{i % 256:02x}{i // 256:02x}60") for i in range(ROWS)]
    manifest = write_manifest(tmp_path / "m.parquet", {"image": images})
    output = tmp_path / "out"
    words = ("run", manifest, *ENGINE, "-o", output, "--checkpoint-rows", "16", "--json")
    with Command(*words) as command:
        run_json = output / OURS / "run.json"
        until(run_json.exists, "the run has begun")
        until(lambda: len(committed_rows(output)) > 100, "rows are committed")
        below = descendants(command.pid)
        assert engine_processes(command.pid)
        assert core_process(command.pid)
        command.signal(signal.SIGKILL)
        until(lambda: not any(map(is_alive, below)), "all are gone")
        kept = committed_rows(output)

    with Command(*words) as command:
        first = until(lambda: core_process(command.pid), "the core is there")
        until(lambda: len(committed_rows(output)) > len(kept) + 100, "it goes on")
        assert first
        os.kill(first, signal.SIGKILL)
        run = command.wait(300)
    assert run.exit_code == 0, run
    summary = run.json
    assert_adds_up(summary)
    assert summary["failed"] == 0
    assert summary["worker_deaths"] == 1
    assert summary["resumed"]
    assert summary["skipped"] >= len(kept)
    # What was answered when the core died is kept; only its requests are computed again.
    asked = summary["engine_counters"]["prompts"]
    assert asked <= summary["ok"] + 32 + 16 + 64
    rows = read_results(output)["row"].to_pylist()
    assert rows == list(range(ROWS))
