"""``vlmbatch plan``: what a run would do and cost, without a model and without writing anything.

The run's own code begins it, words its requests and loads its images; only the asking is left out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from vlmbatch.errors import RunStopped
from vlmbatch.executors.choice import choose_executor
from vlmbatch.job import JobSpec
from vlmbatch.planning.costs import Estimate, Rates, Tokens, estimate, tokens_of
from vlmbatch.planning.rows import Prompt, Requests, RowsToDo
from vlmbatch.planning.sample import Sample, checked, sample_of
from vlmbatch.planning.trial import Tried, tried
from vlmbatch.results.files import Counts
from vlmbatch.results.store import STATUS_FILE
from vlmbatch.run import Start, look
from vlmbatch.summary import TOO_MANY_FAILED

NO_RATES = Rates()


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    manifest: str
    output: str
    rows: int
    answered: int
    """Rows that a resume would skip."""
    failed_earlier: int
    """Of those: failed ones, for ``vlmbatch retry``."""
    to_do: int
    requests: Requests
    tasks: list[str]
    model: str
    engine: str
    family: str
    executor: str
    workers: int
    commits: int
    parts: int
    """Output files when all is done."""
    checkpoint_rows: int
    part_rows: int
    sample: Sample
    max_failure_rate: float
    tokens: Tokens | None
    """None where no row of the sample can be asked about."""
    estimate: Estimate | None
    """None where no rate is known."""
    system: str | None
    prompt_form: str
    """``whole``, or ``user's turn``: the engine puts the image before it and applies the model's
    chat template."""
    prompts: list[Prompt]
    tried: Tried | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return TOO_MANY_FAILED if self.sample.failure_rate > self.max_failure_rate else 0

    def as_text(self) -> str:
        """For a person."""
        from vlmbatch.planning.text import describe

        return describe(self)

    def to_json(self) -> dict[str, Any]:
        sample = {**asdict(self.sample), "failure_rate": round(self.sample.failure_rate, 4)}
        return {**asdict(self), "sample": sample, "exit_code": self.exit_code}


def plan(
    job: JobSpec,
    *,
    sample: int,
    rates: Rates = NO_RATES,
    tries: int = 0,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Plan:
    """Look at everything that a run begins with. ``tries``: rows to put to the model itself.

    Raises what would refuse the run. Writes nothing, except (``tries``) in a temporary folder.
    """
    start = look(job, overwrite=overwrite, command=command)
    job, model = start.resolved.job, start.resolved.model
    asking = start.resolved.asking
    rows = RowsToDo(start.manifest, start.pending, asking)
    total = start.manifest.rows_within(job.limit)
    before = Counts() if start.output is None else start.output.counts()
    began = time.monotonic()
    looked_at = asyncio.run(checked(rows.sample(sample), job, asking, start.manifest.folder))
    found = sample_of(looked_at, time.monotonic() - began)
    requests = rows.requests([each.requests for each in looked_at])
    executor, workers = choose_executor(job, rows.count)
    trial = tried(job, tries) if tries else None
    answer = _answer(trial, before) or (float(job.sampling.max_tokens), "at most")
    tokens = tokens_of(looked_at, requests.count, model, *answer)
    return Plan(
        manifest=start.manifest.extent,
        output=start.store.place,
        rows=total,
        answered=total - rows.count,
        failed_earlier=before.failed_rows,
        to_do=rows.count,
        requests=requests,
        tasks=[task.name for task in asking.tasks],
        model=model["label"],
        engine=job.engine.name,
        family=asking.family.name,
        executor=executor,
        workers=workers,
        commits=sum(-(-len(each) // job.checkpoint_rows) for each in rows.pending),
        parts=-(-total // job.part_rows),
        checkpoint_rows=job.checkpoint_rows,
        part_rows=job.part_rows,
        sample=found,
        max_failure_rate=job.max_failure_rate,
        tokens=tokens,
        estimate=estimate(
            rates,
            rows.count,
            images_per_row=fmean([len(each.sizes) for each in looked_at if each.sizes] or [1]),
            tokens=tokens,
            workers=workers,
            gpus=workers * job.gpus_per_worker,
            measured=_measured(trial, start, workers),
        ),
        system=job.system,
        prompt_form="whole" if asking.family.raw else "user's turn",
        prompts=rows.prompts(),
        tried=trial,
        warnings=_warnings(start, found, tokens, rates),
    )


def _answer(trial: Tried | None, before: Counts) -> tuple[float, str] | None:
    """Tokens of an answer, and where that is from; None where there is none to measure."""
    if trial is not None and trial.completion_tokens:
        good = sum(each["status"] == "ok" for each in trial.results)
        return trial.completion_tokens / max(1, good), "as tried"
    good = before.requests - sum(before.failures.values())
    if before.completion_tokens and good:
        return before.completion_tokens / good, "as answered earlier"
    return None


def _measured(trial: Tried | None, start: Start, workers: int) -> tuple[float, str] | None:
    """(rows per second of all workers, said in words with where that is from)."""
    if start.stored is not None:
        with suppress(RunStopped):
            latest = start.store.read_json(STATUS_FILE) or {}
            if rate := float(latest.get("rows_per_second") or 0):
                return rate, f"{rate:g} rows/s, as in this output's last start"
    if trial is not None and trial.rows_per_second:
        rate = trial.rows_per_second
        return rate * workers, f"{rate:g} rows/s per worker, as the tried ones"
    return None


def _warnings(start: Start, found: Sample, tokens: Tokens | None, rates: Rates) -> list[str]:
    job = start.resolved.job
    warnings = list(start.resolved.warnings)
    if start.stored is not None and start.store.is_locked():
        warnings.append(f"another run holds {start.store.place} at this moment")
    if job.engine.image_transport == "url":
        warnings.append("images go to the endpoint as URLs: none was fetched here")
    if rates.tokens_per_second and tokens is not None and tokens.prompt_total is None:
        warnings.append(
            "what an image costs in tokens is not known of this model: --tokens-per-second says "
            "nothing about the time"
        )
    if found.failure_rate > job.max_failure_rate:
        warnings.append(
            f"{found.failed} of {found.rows} sampled rows would fail ({found.failure_rate:.1%}), "
            f"and --max-failure-rate allows {job.max_failure_rate:.1%}"
        )
    return warnings
