"""Commands that look at a machine, a model or an output: doctor, models, status, quality, eval."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmbatch.cli.job_options import job_from_options
from vlmbatch.cli.program import clean_errors, say, tell
from vlmbatch.cli.run_options import RUN_OPTIONS, with_options
from vlmbatch.cli.values import seconds
from vlmbatch.errors import UsageError

if TYPE_CHECKING:
    from vlmbatch.job import JobSpec


@click.command()
@with_options(RUN_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@clean_errors
def doctor(as_json: bool, **options: Any) -> None:
    """Whether this machine can run a job, and each problem with its remedy.

    Takes the options of `run`, or none: then it looks at the installation alone. Loads no model and
    writes nothing. Ends with 1 if something stands in the way.
    """
    from vlmbatch.doctor import describe as describe_findings
    from vlmbatch.doctor import examine, problems

    def make() -> JobSpec | None:
        named = options["manifest"] or options["job_file"] or "manifest" in options["settings"]
        return job_from_options(options) if named else None

    findings = examine(make, model=options["model"], output=options["output"])
    if as_json:
        click.echo(json.dumps([each.to_json() for each in findings], indent=1, ensure_ascii=False))
    else:
        click.echo(describe_findings(findings))
    sys.exit(1 if problems(findings) else 0)


@click.command()
@click.argument("model", required=False)
@click.option("--family", metavar="NAME|FILE", help="As for run.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@clean_errors
def models(model: str | None, family: str | None, as_json: bool) -> None:
    """The model families that vlmbatch knows; with MODEL, how that model will be asked."""
    from vlmbatch.catalogue import describe_families, describe_model

    if family is not None and model is None:
        raise UsageError("--family is for one model: vlmbatch models MODEL --family ...")
    found = describe_families() if model is None else describe_model(model, family)
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for line in found if isinstance(found, list) else [found]:
        for key, value in line.items():
            if isinstance(value, dict):
                click.echo(f"{key}:")
                for name, text in value.items():
                    shown = "?" if text is None else str(text).replace("\n", "\\n")
                    click.echo(f"  {name + ':':<18} {shown}")
            elif value not in ("", False):
                click.echo(f"{key.replace('_', ' ') + ':':<13} {'yes' if value is True else value}")
        click.echo("")


class _Status(click.Command):
    """``--watch`` may stand without its SECONDS, also right before OUTPUT."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        for at, word in enumerate(args):
            after = args[at + 1] if at + 1 < len(args) else ""
            if word == "--watch" and not re.fullmatch(r"\d{1,4}(\.\d+)?(s|m|min|h)?", after):
                words[at] = "--watch=2s"
        return super().parse_args(ctx, words)


@click.command(cls=_Status)
@click.argument("output")
@click.option(
    "--watch",
    metavar="[SECONDS]",
    callback=seconds,
    help="Look again every SECONDS (2) until the run ends, or all of them.",
)
@click.option(
    "--last",
    type=click.IntRange(min=1),
    metavar="N",
    default=14,
    help="Of a folder of outputs, the N newest. Default: 14.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON; each look in a line.")
@clean_errors
def status(output: str, watch: float | None, last: int, as_json: bool) -> None:
    """Progress, rates and failures by reason, while a run goes on and after it.

    OUTPUT may be a folder of outputs, too, such as one for each night: a line for each, with its
    trend against the one before.
    """
    from vlmbatch.history import Outputs
    from vlmbatch.watch import shown
    from vlmbatch.watch import watch as keep_looking

    outputs = Outputs(output, last=last)
    if watch is not None:
        keep_looking(outputs, watch, as_json=as_json)
    else:
        found = outputs.look()
        click.echo(json.dumps(found, indent=1) if as_json else shown(found))


@click.command()
@click.argument("output")
@click.option(
    "--fail-on",
    multiple=True,
    metavar="GATE",
    help="Exit code 3 if it holds, as in 'repeated>0.05' or 'caption.words_median<5', of the "
    "figures in --json; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@clean_errors
def quality(output: str, fail_on: tuple[str, ...], as_json: bool) -> None:
    """Whether the answers of OUTPUT are any good: repeated, stuck in a loop, cut, refused, ...

    Looks at every result once, asks no model, and keeps what it found in the output.
    """
    from vlmbatch.placeholders import hidden
    from vlmbatch.quality.measuring import measure

    found = measure(output, fail_on=fail_on)
    shown = json.dumps(found.quality, indent=1, ensure_ascii=False) if as_json else found.text
    click.echo(hidden(shown))
    for warning in found.warnings:
        say("Warning", warning)
    for gate in found.failed_gates:
        click.echo(f"Failed: {gate}", err=True)
    sys.exit(found.exit_code)


@click.command("eval")
@click.argument("output")
@click.option(
    "--references",
    multiple=True,
    required=True,
    metavar="FILE",
    help="What is right: Parquet, JSONL or CSV with id (or row), request, task, text, boxes; "
    "repeatable.",
)
@click.option(
    "--normalize",
    type=click.Choice(["exact", "vqa"]),
    default="exact",
    help="What is done to texts before they are compared: exact trims, vqa is for short answers "
    "(case, articles, punctuation, number words). Default: exact.",
)
@click.option(
    "--show",
    type=click.IntRange(min=0),
    metavar="N",
    default=3,
    help="Wrong answers to show, of each task. Default: 3.",
)
@click.option("--output", "file", metavar="FILE", help="Write the JSON there, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the evaluation as JSON.")
@clean_errors
def evaluate(
    output: str,
    references: tuple[str, ...],
    normalize: str,
    show: int,
    file: str | None,
    as_json: bool,
) -> None:
    """Judge the answers of OUTPUT by references.

    Texts are right if they are one of the reference's, boxes by IoU 0.5. Failed and missing answers
    are wrong. What has no reference is counted, and not judged.
    """
    from vlmbatch.evaluation import evaluate as judge

    found = judge(output, references, normalize=normalize, show=show)
    if file is not None:
        text = json.dumps(found.to_json(), indent=1, ensure_ascii=False)
        Path(file).write_text(f"{text}\n", encoding="utf-8")
    tell(found, as_json)
