"""What a run prints at its end, for a person and as JSON."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from typing import Any

from vlmbatch.results.files import Counts
from vlmbatch.run_file import RunFile
from vlmbatch.tally import Tally

INTERRUPTED, TOO_MANY_FAILED = 130, 3
"""Exit codes."""


@dataclass(slots=True)
class Summary:
    """What a run prints at its end. ``rows`` = ``ok`` + ``failed`` + ``skipped``, unless the run
    was stopped; then ``rows`` are still those of the manifest and ``left`` were not reached."""

    rows: int
    requests: int
    ok: int
    failed: int
    skipped: int
    left: int
    failures: dict[str, int]
    truncated: int
    seconds: float
    rows_per_second: float
    prompt_tokens: int
    completion_tokens: int
    attempts: dict[str, int]
    """How many answers needed how many calls of the engine."""
    engine_starved: float | None
    """Share of the time in which engines had fewer requests than they can use."""
    engine_counters: dict[str, int]
    """What loaders and engines have done: decoded images, cached tokens, ..."""
    model: str
    engine: str
    executor: str
    workers: int
    worker_deaths: int
    output: str
    resumed: bool
    exit_code: int
    warnings: list[str] = field(default_factory=list)
    state: str = "finished"
    """As `vlmbatch status` has it: finished, interrupted, stopped, prepared."""
    reason: str = ""
    """Why it is not finished, or why finished is not enough."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        """For a person."""
        ends = {0: "done", INTERRUPTED: "interrupted", TOO_MANY_FAILED: "too many rows failed"}
        left = f", {self.left:,} left" if self.left else ""
        plural = "" if self.requests == 1 else "s"
        lines = [
            f"{ends.get(self.exit_code, 'stopped')}: {self.rows:,} rows = {self.ok:,} ok + "
            f"{self.failed:,} failed + {self.skipped:,} answered earlier{left}",
            f"  {self.requests:,} answer{plural} in {self.seconds:.1f} s "
            f"({self.rows_per_second:,.1f} rows/s), {self.completion_tokens:,} tokens, "
            f"by {self.model} ({self.engine})",
            f"  in {self.output}",
        ]
        if line := _more_attempts(self.attempts):
            lines.insert(-1, f"  {line}")
        for code, count in self.failures.items():
            lines.insert(-1, f"    {count:>9,}  {code}")
        if self.failed:
            command = shlex.join(["vlmbatch", "retry", self.output])
            lines.append(f"  to ask the failed ones again: {command}")
        if self.left:
            raised = self.exit_code == TOO_MANY_FAILED
            how = ", with a higher --max-failure-rate" if raised else ""
            lines.append(f"  to go on: the same command again{how}")
        return "\n".join(lines)


def _more_attempts(attempts: dict[str, int]) -> str:
    """For example: 12 answers needed 2 attempts, 1 needed 3. Empty if one was enough for all."""
    more = [(count, number) for number, count in attempts.items() if number != "1"]
    if not more:
        return ""
    (count, number), *rest = more
    first = f"{count:,} answer{'' if count == 1 else 's'} needed {number} attempts"
    return ", ".join([first, *(f"{count:,} needed {number}" for count, number in rest)])


def summarise(
    run_file: RunFile,
    tally: Tally,
    done: Counts,
    before: Counts,
    *,
    rows: int,
    skipped: int,
    executor: str,
    workers: int,
    output: str,
    resumed: bool,
    code: int,
    is_retry: bool,
    warnings: list[str],
    state: str = "finished",
    reason: str = "",
) -> Summary:
    """``done``: what this start has added or asked again; ``before``: the output as it was."""
    if before.failed_rows and not is_retry:
        warnings.append(
            f"{before.failed_rows:,} rows failed in an earlier run; to ask them again: "
            f"vlmbatch retry {shlex.quote(output)}"
        )
    if done.truncated:
        warnings.append(
            f"{done.truncated:,} answers were cut at --max-tokens (finish_reason is 'length')"
        )
    return Summary(
        rows=rows,
        requests=done.requests,
        ok=done.rows - done.failed_rows,
        failed=done.failed_rows,
        skipped=skipped,
        left=max(0, rows - done.rows - skipped),
        failures=dict(done.failures.most_common()),
        truncated=done.truncated,
        seconds=round(tally.seconds, 3),
        rows_per_second=round(done.rows / tally.seconds, 2) if tally.seconds else 0.0,
        prompt_tokens=done.prompt_tokens,
        completion_tokens=done.completion_tokens,
        attempts={str(attempts): count for attempts, count in sorted(done.attempts.items())},
        engine_starved=tally.engine_starved,
        engine_counters=dict(sorted(tally.counters.items())),
        model=run_file.model["label"],
        engine=run_file.spec.engine.name,
        executor=executor,
        workers=workers,
        worker_deaths=tally.deaths,
        output=output,
        resumed=resumed,
        exit_code=code,
        warnings=warnings,
        state=state,
        reason=reason,
    )
