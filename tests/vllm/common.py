"""What the tests on vLLM share: small settings, and real processes to kill."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

from tests.harness import OURS, descendants

ENGINE = (
    *("--engine", "vllm", "-m", "demo", "--max-model-len", "512", "--max-num-seqs", "32"),
    *("--engine-arg", "enforce_eager=true", "--engine-arg", "block_size=32"),
)
"""Options of a run on the CPU."""


def engine_processes(pid: int) -> set[int]:
    """The processes under this one that vLLM has named as its own."""
    return {each for each in descendants(pid) if _name(each).startswith("VLLM::")}


def core_process(pid: int) -> int | None:
    """vLLM's engine core under this process."""
    cores = [each for each in descendants(pid) if _name(each).startswith("VLLM::EngineCore")]
    return cores[0] if cores else None


def kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def worker_logs(output: Path) -> list[Path]:
    """A log for each worker that was started, and each has one engine."""
    return sorted((output / OURS / "logs").glob("worker-*.log"))


def said_in_logs(output: Path, pattern: str) -> list[str]:
    logs = [log.read_text(errors="replace") for log in worker_logs(output)]
    return [found for log in logs for found in re.findall(pattern, log)]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""
