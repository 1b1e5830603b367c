"""``vlmbatch doctor``: what stands in the way of a job here, each problem with its remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from vlmbatch.doctor import jobs, machine
from vlmbatch.doctor.findings import Check, Finding, findings_of, problem
from vlmbatch.doctor.places import output_place
from vlmbatch.errors import VlmbatchError
from vlmbatch.job import JobSpec

__all__ = ["Finding", "describe", "examine", "problems"]


def examine(
    make_job: Callable[[], JobSpec | None],
    *,
    model: str | None = None,
    output: str | None = None,
) -> list[Finding]:
    """The installation, the machine, and the job, if there is one; else a model, or an output.

    A job that cannot be made is a finding too.
    """
    checks = machine.checks()
    try:
        job = make_job()
    except VlmbatchError as error:
        return [*findings_of(checks), problem("job", error.message, error.hint or "")]
    if job is not None:
        about_job = jobs.checks_of(job)
    else:
        about_job = [] if model is None else jobs.model_checks(jobs.Model(model))
        if output is not None:
            about_job.append(
                Check("output", partial(output_place, output), jobs.STORE_SECONDS, True)
            )
    found = findings_of([*checks, *about_job])
    if job is not None:
        found = [machine.as_needed(each, job.engine) for each in found]
    if job is not None and not problems(found[len(checks) :]):
        found += jobs.start_findings(job)
    return found


def problems(findings: Sequence[Finding]) -> list[Finding]:
    return [each for each in findings if each.status == "problem"]


def describe(findings: Sequence[Finding]) -> str:
    """For a person."""
    width = max(len(each.name) for each in findings)
    lines = []
    for each in findings:
        what = each.what.replace("\n", "\n" + " " * (width + 11))
        lines.append(f"{each.status:<8} {each.name:<{width}}  {what}")
        if each.remedy:
            indent = " " * (width + 11)
            lines += [f"{indent}-> {line}" for line in each.remedy.splitlines()[:1]]
            lines += [f"{indent}{line}" for line in each.remedy.splitlines()[1:]]
    found = len(problems(findings))
    stands = "nothing stands in the way" if not found else f"{found} problem{'s' * (found > 1)}"
    return "\n".join([*lines, stands])
