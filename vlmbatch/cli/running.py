"""Commands that ask, or would ask, or read again: run, plan, retry, reparse."""

from __future__ import annotations

import sys
from typing import Any

import click

from vlmbatch.cli.job_options import job_from_options
from vlmbatch.cli.program import clean_errors, tell
from vlmbatch.cli.run_options import NOTIFY_OPTION, RUN_OPTIONS, with_options
from vlmbatch.cli.values import pairs, words
from vlmbatch.errors import UsageError


@click.command()
@with_options(RUN_OPTIONS)
@click.option("--overwrite", is_flag=True, help="Start anew: delete the output's results first.")
@click.option(
    "--prepare",
    is_flag=True,
    help="Make the output and ask nothing yet, as for export --to openai-batch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@clean_errors
def run(overwrite: bool, prepare: bool, as_json: bool, **options: Any) -> None:
    """Ask a model about every row of MANIFEST; run again to resume.

    MANIFEST is Parquet, JSONL, CSV or a WebDataset, a folder of such files or of images, or a glob,
    on this machine or in a store (s3:, gs:, az:, hf:, https:); several may be given. Its column
    `image` holds paths, bytes, Hugging Face image structs, or lists of these.
    """
    from vlmbatch.notify import notified
    from vlmbatch.run import output_folder
    from vlmbatch.run import run as run_job

    with notified("run", options["notify_url"], options["output"] or "") as ending:
        job = job_from_options(options)
        ending.url, ending.output = job.notify_url, output_folder(job)
        summary = run_job(job, overwrite=overwrite, prepare=prepare, command=sys.argv[1:])
        ending.summary = summary
        if prepare and not as_json:
            click.echo(
                f"prepared: {summary.left:,} rows to do, {summary.skipped:,} answered -> "
                f"{summary.output}"
            )
        else:
            tell(summary, as_json)
    sys.exit(summary.exit_code)


@click.command()
@with_options(RUN_OPTIONS)
@click.option("--overwrite", is_flag=True, help="Plan to start anew.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=64,
    metavar="N",
    help="Rows whose images are fetched and decoded, spread over the manifest. Default: 64.",
)
@click.option(
    "--try",
    "tries",
    type=click.IntRange(min=1),
    metavar="N",
    help="Put the first N rows to the model itself, and show the answers.",
)
@click.option(
    "--images-per-second",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Of one worker, for the time. Default: the rate of the output's last start, if any.",
)
@click.option(
    "--tokens-per-second",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Of one worker, prompts and answers together, likewise.",
)
@click.option(
    "--price-per-gpu-hour",
    type=click.FloatRange(min=0),
    metavar="P",
    help="What an hour of one GPU costs, for the cost of the run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@clean_errors
def plan(
    overwrite: bool,
    sample: int,
    tries: int | None,
    images_per_second: float | None,
    tokens_per_second: float | None,
    price_per_gpu_hour: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """What `run` with the same options would do and cost. Loads no model, writes nothing.

    Checks a sample of the images, shows the first prompts, counts requests and tokens. Ends with 2
    where `run` would refuse, with 3 if more of the sample fails than --max-failure-rate allows.
    """
    from vlmbatch.planning import plan as plan_job
    from vlmbatch.planning.costs import Rates

    made = plan_job(
        job_from_options(options),
        sample=sample,
        rates=Rates(images_per_second, tokens_per_second, price_per_gpu_hour),
        tries=tries or 0,
        overwrite=overwrite,
        command=sys.argv[1:],
    )
    tell(made, as_json)
    sys.exit(made.exit_code)


@click.command()
@click.argument("output")
@click.option("--codes", callback=words, help="Only failures with these codes: a,b.")
@click.option("--workers", type=int, help="Engines. Default: as before.")
@click.option("--executor", type=click.Choice(["auto", "local", "ray"]), help="As for run.")
@click.option("--ray-address", metavar="ADDR", help="As for run.")
@click.option("--base-url", metavar="URL", help="Where the endpoint is by now (openai).")
@click.option("--checkpoint-rows", type=int, help="Rows per commit. Default: as before.")
@click.option("--max-failure-rate", type=float, help="As for run.")
@click.option(
    "--engine-arg",
    "engine_args",
    multiple=True,
    callback=pairs,
    metavar="KEY=VALUE",
    help="A setting of the engine that changes no answer; repeatable.",
)
@NOTIFY_OPTION
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@clean_errors
def retry(
    output: str,
    codes: list[str] | None,
    engine_args: dict[str, str],
    notify_url: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Ask the failed results of OUTPUT again; each part is replaced in one step."""
    from vlmbatch.errors import ErrorCode
    from vlmbatch.notify import notified
    from vlmbatch.run import retry as retry_failed

    for code in codes or ():
        if code not in set(ErrorCode):
            raise UsageError(f"unknown code {code!r}", hint=f"known: {', '.join(ErrorCode)}")
    changes = {key: value for key, value in settings.items() if value is not None}
    engine: dict[str, Any] = {"args": engine_args}
    if "base_url" in changes:
        engine["base_url"] = changes.pop("base_url")
    with notified("retry", notify_url, output) as ending:
        ending.summary = summary = retry_failed(output, tuple(codes or ()), changes, engine)
        tell(summary, as_json)
    sys.exit(summary.exit_code)


@click.command()
@click.argument("output")
@click.option("--family", metavar="NAME|FILE", help="Whose parser reads. Default: as before.")
@click.option("--box-space", help="As for run. Default: as before, the family's with --family.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@clean_errors
def reparse(output: str, family: str | None, box_space: str | None, as_json: bool) -> None:
    """Text, boxes and json of OUTPUT again from the raw answers, without a model.

    For a better parser (of a newer vlmbatch, or another family's), and for boxes in the wrong
    pixels. The next run goes on with it.
    """
    from vlmbatch.reparse import reparse as read_again

    summary = read_again(output, family=family, box_space=box_space)
    tell(summary, as_json)
    sys.exit(summary.exit_code)
