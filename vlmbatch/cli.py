"""The command line. Thin: options become a JobSpec; everything heavy is imported by the command."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmbatch import __version__
from vlmbatch.errors import UsageError, VlmbatchError
from vlmbatch.schedule import TARGETS

if TYPE_CHECKING:
    from vlmbatch.batches.importing import Imported
    from vlmbatch.evaluation import Evaluation
    from vlmbatch.exports.exporting import Exported
    from vlmbatch.exports.openai_batch import Exported as ExportedRequests
    from vlmbatch.job import JobSpec
    from vlmbatch.planning import Plan
    from vlmbatch.reparse import Reparsed
    from vlmbatch.summary import Summary


def _say(kind: str, message: str) -> None:
    from vlmbatch.placeholders import hidden  # only here: it takes 10 ms of every start

    click.echo(f"{kind}: {hidden(message)}", err=True)


def clean_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """An error of ours is one message and its exit code, never a traceback.

    SIGTERM is a Ctrl-C, also before and after the time in which the driver listens to signals.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return command(*args, **kwargs)
        except VlmbatchError as error:
            _say("Error", str(error))
            sys.exit(error.exit_code)
        except BrokenPipeError:  # nobody reads what we print; not even Python's last flush is read
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            reason = f"{error.strerror or error}{where}"
            try:
                os.getcwd()
            except OSError:
                reason = "the current folder is gone\n  -> change to one that exists"
            _say("Error", reason)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)

    return wrapped


class _Program(click.Group):
    """The group, made safe against how it was started."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _open_standard_streams()
        for word in sys.argv[1:]:
            if any("\ud800" <= letter <= "\udfff" for letter in word):
                click.echo(
                    f"Error: an argument is not valid UTF-8: {word!r}\n"
                    "  -> rename what it names, or set a UTF-8 locale, such as LC_ALL=C.UTF-8",
                    err=True,
                )
                sys.exit(2)
        return super().main(*args, **kwargs)


def _open_standard_streams() -> None:
    """A file that we open must never become descriptor 0, 1 or 2 because that one was closed; and
    no character that a terminal lacks may end a run."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vlmbatch")
def main() -> None:
    """Ask a vision-language model something about every image of a dataset.

    \b
    vlmbatch plan manifest.parquet --task caption    (asks nothing, writes nothing)
    vlmbatch run manifest.parquet --task caption     (again: it resumes)
    vlmbatch status OUTPUT                           (also of many: the folder above)
    vlmbatch retry OUTPUT
    vlmbatch reparse OUTPUT
    vlmbatch quality OUTPUT                          (are the answers any good?)
    """


def _pairs(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    pairs = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
        pairs[key] = rest
    return pairs


def _words(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> list[str] | None:
    return None if value is None else _split(value)


def _split(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


def _text(value: str) -> str:
    """TEXT, or the content of a file for @FILE."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {value[1:]}: {error}") from None


def _notify_url(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    if value is None:
        return None
    from vlmbatch.job import notify_url_from

    try:
        return notify_url_from(_text(value).strip())
    except (UsageError, ValueError) as error:
        raise click.BadParameter(str(error)) from None


NOTIFY_OPTION = click.option(
    "--notify-url",
    metavar="URL|@FILE",
    callback=_notify_url,
    help="However it ends, post the summary there as JSON. The address is a secret.",
)

RUN_OPTIONS: list[Callable[..., Any]] = [
    click.argument("manifest", nargs=-1),
    click.option(
        "--job", "job_file", metavar="FILE", help="A job spec (YAML); options win over it."
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        callback=_pairs,
        metavar="KEY=VALUE",
        help="A key of the job spec, as in sampling.max_tokens=64; repeatable.",
    ),
    click.option(
        "--date",
        metavar="DAY",
        help="The day that {date} in a job spec is, to run a night again: 2026-11-21. Default: "
        "today, in UTC or the spec's timezone.",
    ),
    click.option(
        "-t",
        "--task",
        "tasks",
        multiple=True,
        help="caption, vqa, ground, detect, ocr, a name of your own with --prompt, or judge, whose "
        "MANIFEST is the OUTPUT of another run; repeatable.",
    ),
    click.option("-m", "--model", help="Hub id, local directory, or demo (the bundled model)."),
    click.option(
        "-o",
        "--output",
        help="Output: a folder, or a prefix as s3://bucket/run. Default: <manifest>-<tasks>/.",
    ),
    click.option("--revision", help="Commit, branch or tag of a Hub model."),
    click.option(
        "--prompt",
        "prompts",
        multiple=True,
        metavar="[TASK=]TEXT|@FILE",
        help="Word a task differently: a Jinja template over the row's columns.",
    ),
    click.option(
        "--json-schema",
        "json_schemas",
        multiple=True,
        metavar="[TASK=]FILE",
        help="Answers are JSON that fits the JSON Schema in FILE; repeatable.",
    ),
    click.option(
        "--choices",
        multiple=True,
        metavar="[TASK=]A,B",
        help="An answer is one of these; repeatable.",
    ),
    click.option(
        "--regex",
        "regexes",
        multiple=True,
        metavar="[TASK=]RE",
        help="The whole answer matches this; repeatable.",
    ),
    click.option("--system", metavar="TEXT|@FILE", help="System prompt."),
    click.option(
        "--style", type=click.Choice(["short", "detailed"]), help="Of captions. Default: short."
    ),
    click.option("--question", help="The question for every row, without a question column."),
    click.option("--phrase", help="The phrase to ground, without a phrase column."),
    click.option(
        "--labels", callback=_words, help="What to detect: a,b,c; without a labels column."
    ),
    click.option(
        "--column",
        "columns",
        multiple=True,
        callback=_pairs,
        metavar="OURS=THEIRS",
        help="The manifest's name for a column, as in image=url; repeatable.",
    ),
    click.option(
        "--carry",
        multiple=True,
        metavar="COL",
        help="Copy a manifest column to the results; * is all but images; repeatable.",
    ),
    click.option(
        "--include",
        multiple=True,
        metavar="GLOB",
        help="Of a folder's files, only these: by path if it has a /, else by name; repeatable.",
    ),
    click.option(
        "--exclude", multiple=True, metavar="GLOB", help="All but these, likewise; repeatable."
    ),
    click.option("--limit", type=int, metavar="N", help="Only the first N rows."),
    click.option(
        "--incremental",
        is_flag=True,
        default=None,
        help="Only rows whose id the output has not answered; the manifest may be another one in "
        "each start.",
    ),
    click.option(
        "--detect-changes",
        is_flag=True,
        default=None,
        help="With --incremental: ask anew where an image's ETag or size is another one.",
    ),
    click.option(
        "--max-attempts",
        type=int,
        metavar="N",
        help="With --incremental: what failed for a cause that may pass is asked again in later "
        "starts, so often in all. Default: 5.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["auto", "vllm", "transformers", "openai", "echo"]),
        help="What runs the model; echo needs none. Default: auto.",
    ),
    click.option(
        "--engine-arg",
        "engine_args",
        multiple=True,
        callback=_pairs,
        metavar="KEY=VALUE",
        help="A setting of the engine; repeatable.",
    ),
    click.option("--dtype", help="auto, float32, bfloat16, float16."),
    click.option("--batch-size", type=int, help="Requests per batch (transformers)."),
    click.option("--max-model-len", type=int, help="Tokens of context (vllm)."),
    click.option("--max-num-seqs", type=int, help="Requests computed at once (vllm)."),
    click.option(
        "--gpu-memory-utilization", type=float, help="Share of each GPU's memory to take (vllm)."
    ),
    click.option("--quantization", help="awq, gptq, fp8, ... (vllm)."),
    click.option("--kv-cache-dtype", help="auto, fp8, ... (vllm)."),
    click.option("--lora", metavar="PATH", help="Folder of a LoRA adapter (vllm)."),
    click.option("--base-url", metavar="URL", help="Address that ends in /v1 (openai)."),
    click.option(
        "--api-key-env",
        metavar="NAME",
        help="Environment variable with the key (openai). Default: OPENAI_API_KEY.",
    ),
    click.option("--concurrency", type=int, help="Requests at once, at most (openai)."),
    click.option(
        "--image-transport",
        type=click.Choice(["inline", "url"]),
        help="Images travel in the request, or as the manifest's URLs (openai). Default: inline.",
    ),
    click.option(
        "--family",
        metavar="NAME|FILE",
        help="Force a model family: how it is asked and read. FILE.py: one of your own.",
    ),
    click.option("--box-space", help="Another reading of the family's boxes: see vlmbatch models."),
    click.option("--max-tokens", type=int, help="Tokens per answer, at most. Default: 256."),
    click.option("--min-tokens", type=int, help="Tokens per answer, at least. Default: 0."),
    click.option(
        "--on-truncation",
        type=click.Choice(["keep", "retry", "fail"]),
        help="Of an answer that is cut at --max-tokens: retry asks up to 2 more times, with "
        "more tokens. Default: keep.",
    ),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="An answer ends before TEXT; repeatable."
    ),
    click.option(
        "--repetition-penalty", type=float, help="Above 1, repeating gets rarer. Default: 1."
    ),
    click.option(
        "--num-samples",
        type=int,
        metavar="N",
        help="Answers per request, at a temperature above 0. Default: 1.",
    ),
    click.option("--temperature", type=float, help="Default: 0, greedy."),
    click.option("--top-p", type=float, help="Default: 1."),
    click.option("--seed", type=int, help="For sampling."),
    click.option("--workers", type=int, help="Engines. Default: one per usable GPU, else 1."),
    click.option("--gpus-per-worker", type=int, help="Default: 1."),
    click.option(
        "--executor",
        type=click.Choice(["auto", "local", "ray"]),
        help="Default: auto, which is local for one worker, else ray.",
    ),
    click.option("--ray-address", metavar="ADDR", help="An existing Ray cluster, or auto."),
    click.option("--checkpoint-rows", type=int, help="Rows per commit. Default: 256."),
    click.option("--part-rows", type=int, help="Rows per output file. Default: 65,536."),
    click.option(
        "--max-failure-rate",
        type=float,
        help="Exit code 3 if a larger share of the rows fails. Default: 0.1.",
    ),
    click.option("--image-memory", help="For images, per worker. Default: 1GiB."),
    click.option("--max-image-pixels", type=int, help="Larger images fail. Default: 178,956,970."),
    click.option("--max-image-bytes", help="Larger files fail. Default: 256MiB."),
    click.option(
        "--fetch-concurrency",
        type=int,
        metavar="N",
        help="Images fetched at once from one host or store, per worker. Default: 32.",
    ),
    click.option("--fetch-timeout", help="For one answer of a host or store. Default: 60s."),
    click.option(
        "--allow-private-hosts",
        is_flag=True,
        default=None,
        help="Image URLs may name hosts that are not on the public internet.",
    ),
    click.option(
        "--allow-root",
        "allow_roots",
        multiple=True,
        metavar="DIR",
        help="Local images must be below DIR; repeatable. Default: a manifest on a local disk may "
        "name any file, one from elsewhere none.",
    ),
    click.option("--start-timeout", help="Until a worker is ready. Default: 30min."),
    click.option("--stall-timeout", help="A worker without progress is replaced. Default: 15min."),
    click.option(
        "--trust-remote-code", is_flag=True, default=None, help="Run the model's own code."
    ),
    NOTIFY_OPTION,
]


ENGINE_OPTIONS = {"name": "engine", "args": "engine_args"}
"""Keys of the engine section whose options have other names."""


def with_options(options: list[Callable[..., Any]]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@main.command()
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
            _tell(summary, as_json)
    sys.exit(summary.exit_code)


@main.command()
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
    _tell(made, as_json)
    sys.exit(made.exit_code)


@main.command()
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


@main.command()
@click.argument("output")
@click.option("--codes", callback=_words, help="Only failures with these codes: a,b.")
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
    callback=_pairs,
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
        _tell(summary, as_json)
    sys.exit(summary.exit_code)


@main.command()
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
    _tell(summary, as_json)
    sys.exit(summary.exit_code)


class _Status(click.Command):
    """``--watch`` may stand without its SECONDS, also right before OUTPUT."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        for at, word in enumerate(args):
            after = args[at + 1] if at + 1 < len(args) else ""
            if word == "--watch" and not re.fullmatch(r"\d{1,4}(\.\d+)?(s|m|min|h)?", after):
                words[at] = "--watch=2s"
        return super().parse_args(ctx, words)


def _seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    from vlmbatch.job import parse_seconds

    try:
        seconds = parse_seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    assert isinstance(seconds, float)
    return max(0.1, seconds)


@main.command(cls=_Status)
@click.argument("output")
@click.option(
    "--watch",
    metavar="[SECONDS]",
    callback=_seconds,
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


@main.command()
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
        _say("Warning", warning)
    for gate in found.failed_gates:
        click.echo(f"Failed: {gate}", err=True)
    sys.exit(found.exit_code)


@main.command()
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


def _user_words(templates: tuple[str, ...], paraphrases: str | None) -> dict[str, tuple[str, ...]]:
    from vlmbatch.exports.conversations import paraphrases_in

    words = paraphrases_in(paraphrases) if paraphrases is not None else {}
    for value in templates:
        task, equals, text = value.partition("=")
        named = bool(equals) and re.fullmatch(r"[\w.-]+", task) is not None
        words |= {task: (_text(text),)} if named else {"": (_text(value),)}
    return words


@main.command()
@click.argument("output")
@click.argument("destination", metavar="DEST")
@click.option("--to", "form", required=True, metavar="FORMAT", help="What to write; see above.")
@click.option(
    "--images",
    type=click.Choice(["reference", "copy", "embed"]),
    help="Where images are named, copied into DEST, or put into its files. Default: by format.",
)
@click.option("--split", metavar="NAME=SHARE,...", help="As in train=0.9,val=0.1, by image.")
@click.option("--where", metavar="SQL", help="Only results for which this holds of their columns.")
@click.option("--min-chars", type=click.IntRange(min=1), help="No texts shorter than this.")
@click.option("--max-chars", type=click.IntRange(min=1), help="No texts longer than this.")
@click.option(
    "--drop",
    callback=_words,
    metavar="WHAT,...",
    help="Leave out refusals, preambles, loops, truncated, duplicate-captions, "
    "near-duplicate-images, as `vlmbatch quality` finds them.",
)
@click.option(
    "--max-per-label",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most N results for each label of boxes, choices or answers to questions.",
)
@click.option("--strip-preambles", is_flag=True, help='"The image shows a cat" becomes "A cat".')
@click.option(
    "--conversation",
    type=click.Choice(["per-image", "per-request"]),
    default="per-image",
    help="One conversation with all answers about a row, or one for each. Default: per-image.",
)
@click.option("--system", metavar="TEXT|@FILE", help="A system message for each conversation.")
@click.option(
    "--user-template",
    "user_templates",
    multiple=True,
    metavar="[TASK=]TEXT|@FILE",
    help="What the user asks, as a Jinja template: {{ question }}, carried columns; repeatable.",
)
@click.option(
    "--paraphrases",
    metavar="FILE",
    help="Many such templates, one a line, or JSON of lists by task; the row's id chooses.",
)
@click.option(
    "--for-model",
    metavar="FAMILY|ID",
    help="What will be trained: its prompts, boxes in its syntax. Default: the family that read.",
)
@click.option("--labels", metavar="A,B", help="Of boxes, only these labels, in this order.")
@click.option(
    "--min-box",
    metavar="SIZE",
    help="No boxes with a shorter side: of so many pixels (8), or of the image's (0.01, 1%).",
)
@click.option("--manifest", metavar="PATH", help="Where the run's manifest is by now.")
@click.option(
    "--format-arg",
    "format_args",
    multiple=True,
    callback=_pairs,
    metavar="KEY=VALUE",
    help="A setting of the format; repeatable.",
)
@click.option("--model", help="The server's name for the model (openai-batch). Default: its path.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in DEST.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@clean_errors
def export(
    output: str,
    destination: str,
    form: str,
    model: str | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write what OUTPUT holds in another form, to the folder DEST. After a kill, the same again
    goes on.

    \b
    trl            Parquet for TRL's SFTTrainer: images, messages
    llava          a JSON list for LLaVA's trainers: id, image, conversations
    sharegpt       JSON lines for LLaMA-Factory: messages, images; and dataset_info.json
    axolotl        JSON lines for axolotl (chat_template): messages with content blocks
    jsonl          an object for each answer: text, boxes, json, images, carried columns
    captions       a text file beside each image, for diffusion fine-tuners
    imagefolder    images and metadata.parquet, which `datasets` reads as a folder
    webdataset     tar shards of key.jpg, key.txt, key.json
    hub            as trl, with a data set card, uploaded to the Hugging Face Hub
    coco           boxes: instances_SPLIT.json; captions of the same run: captions_SPLIT.json
    yolo           boxes: data.yaml, images/SPLIT, labels/SPLIT, for ultralytics and its like
    label-studio   boxes and points: tasks_SPLIT.json with predictions, labeling_config.xml
    fiftyone       boxes: SPLIT/labels.json and SPLIT/data, a FiftyOneImageDetectionDataset
    hf-objects     boxes: SPLIT/metadata.parquet beside images, for load_dataset('imagefolder')
    ms-swift       conversations with boxes and points as <bbox> and objects: SPLIT.jsonl
    qwen-vl        conversations for Qwen-VL's own fine-tuning, boxes as Qwen says them
    openai-batch   the requests without a good answer, images inline, as requests-*.jsonl for
                   `vllm run-batch` and hosted batch APIs; import-batch takes the answers in
    """
    if form == "openai-batch":
        from vlmbatch.exports.openai_batch import export_requests

        _only_for_training_data(options)
        _tell(export_requests(output, destination, overwrite=overwrite, model=model), as_json)
        return
    if model is not None:
        raise UsageError("--model is for --to openai-batch", hint="did you mean --for-model?")
    from vlmbatch.exports.base import ImageMode
    from vlmbatch.exports.conversations import Wording
    from vlmbatch.exports.exporting import Settings
    from vlmbatch.exports.exporting import export as export_results

    boxes = {name: options[name] for name in ("labels", "min_box") if options[name] is not None}
    settings = Settings(
        images=options["images"] and ImageMode(options["images"]),
        split=options["split"],
        where=options["where"],
        min_chars=options["min_chars"],
        max_chars=options["max_chars"],
        drop=options["drop"],
        max_per_label=options["max_per_label"],
        strip_preambles=options["strip_preambles"] or None,
        wording=Wording(
            per=options["conversation"].removeprefix("per-"),
            system=None if options["system"] is None else _text(options["system"]),
            user=_user_words(options["user_templates"], options["paraphrases"]),
            for_model=options["for_model"],
        ),
        options={**options["format_args"], **boxes},
    )
    _tell(
        export_results(
            output,
            destination,
            form,
            settings,
            manifest=options["manifest"],
            overwrite=overwrite,
        ),
        as_json,
    )


def _only_for_training_data(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value not in (None, (), {}, False, "per-image"):
            flag = {"user_templates": "user-template", "format_args": "format-arg"}.get(name, name)
            raise UsageError(
                f"--{flag.replace('_', '-')} is for training data, not for --to openai-batch",
                hint="leave it out",
            )


@main.command("import-batch")
@click.argument("output")
@click.argument("files", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@clean_errors
def import_batch(output: str, files: tuple[str, ...], as_json: bool) -> None:
    """Take the answers of an exported batch into OUTPUT, as if the run had asked.

    FILES are result files of `vllm run-batch` or of a batch API, in any order. Answers that are
    there already stay; failed ones are replaced where the files have a good answer.
    """
    from vlmbatch.batches.importing import import_batch as import_answers

    summary = import_answers(output, files)
    _tell(summary, as_json)
    sys.exit(summary.exit_code)


@main.command("eval")
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
    _tell(found, as_json)


@main.command()
@click.argument("manifest", nargs=-1, required=True)
@click.option("-o", "--output", default="job.yaml", help="The file to write. Default: job.yaml.")
@click.option("-m", "--model", help="As for run.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@clean_errors
def init(manifest: tuple[str, ...], output: str, model: str | None, overwrite: bool) -> None:
    """Write a commented job spec for MANIFEST, which is looked at.

    It has the tasks that the manifest's columns and the model fit, and runs as it is.
    """
    from vlmbatch.starter import write_spec

    started = write_spec(manifest, output, model=model, overwrite=overwrite)
    click.echo(started.as_text())


@main.command()
@click.argument("job")
@click.option("--for", "target", type=click.Choice(TARGETS), required=True, help="What starts it.")
@click.option("--at", default="02:30", help="When, in the spec's time zone. Default: 02:30.")
@click.option(
    "--image",
    metavar="IMAGE",
    help="Your container image (kubernetes, kuberay). Default: a stand-in.",
)
@clean_errors
def schedule(job: str, target: str, at: str, image: str | None) -> None:
    """Print what starts the job spec JOB every night, from the current folder.

    \b
    cron         a crontab line              systemd    a service and a timer
    kubernetes   a CronJob                   kuberay    a RayJob
    slurm        a batch script              airflow    a DAG
    actions      a workflow of GitHub Actions
    """
    from vlmbatch.schedule.nightly import IMAGE
    from vlmbatch.schedule.nightly import schedule as schedule_for

    click.echo(schedule_for(job, target, at=at, image=image or IMAGE), nl=False)


def job_from_options(options: dict[str, Any]) -> JobSpec:
    """The spec that these options describe, over that of --job: only what was given is set."""
    from vlmbatch.job_file import load_job

    given = {key: value for key, value in options.items() if value not in (None, (), {}, [])}
    if "date" in given and "job_file" not in given:
        raise UsageError("--date is for the {date} of a job spec", hint="add --job FILE")
    return load_job(
        given.get("job_file"),
        options=_values(given),
        settings=given.get("settings"),
        date=given.get("date"),
        environment=os.environ,
    )


def _values(given: dict[str, Any]) -> dict[str, Any]:
    from vlmbatch.job import EngineSpec, SamplingSpec

    values: dict[str, Any] = {
        key: given[key]
        for key in (
            *("output", "model", "revision", "columns", "limit", "family", "box_space", "workers"),
            *("gpus_per_worker", "executor", "ray_address", "checkpoint_rows", "part_rows"),
            *("max_failure_rate", "image_memory", "max_image_pixels", "max_image_bytes"),
            *("fetch_concurrency", "fetch_timeout", "allow_private_hosts"),
            *("start_timeout", "stall_timeout", "trust_remote_code", "notify_url"),
            *("incremental", "detect_changes", "max_attempts"),
        )
        if key in given
    }
    for key in ("manifest", "carry", "include", "exclude", "allow_roots"):
        if key in given:
            values[key] = list(given[key])
    if "system" in given:
        values["system"] = _text(given["system"])
    engine = {name: name for name in EngineSpec.model_fields} | ENGINE_OPTIONS
    sampling = {name: name for name in SamplingSpec.model_fields}
    for section, names in (("engine", engine), ("sampling", sampling)):
        chosen = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
        if chosen:
            values[section] = chosen
    tasks = _tasks(given)
    if tasks:
        values["tasks"] = tasks
    return values


def _tasks(given: dict[str, Any]) -> list[dict[str, Any]]:
    from vlmbatch.job_file import read_json_schema

    asked = list(given.get("tasks", ()))
    per_task: dict[str, tuple[str, str, Callable[[str], Any]]] = {
        "prompts": ("--prompt", "prompt", _text),
        "json_schemas": ("--json-schema", "json_schema", read_json_schema),
        "choices": ("--choices", "choices", _split),
        "regexes": ("--regex", "regex", str),
    }
    names = asked
    if not names and any(key in given for key in (*per_task, "style")):
        names = ["caption"]
    specs: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option, (flag, key, read) in per_task.items():
        for value in given.get(option, ()):
            task, text = _of_task(flag, value, asked)
            if task not in specs:
                raise UsageError(
                    f"{flag} is for a task {task!r} that is not asked", hint=f"add -t {task}"
                )
            specs[task][key] = read(text)
    wording = {
        "caption": ("style",),
        "vqa": ("question",),
        "ground": ("phrase",),
        "detect": ("labels",),
    }
    for task, keys in wording.items():
        for key in keys:
            if key in given and task not in names:
                raise UsageError(f"--{key} is for -t {task}, which is not asked")
    return [
        {
            "name": name,
            **specs[name],
            **{key: given[key] for key in wording.get(name, ()) if key in given},
        }
        for name in names
    ]


def _of_task(flag: str, value: str, names: list[str]) -> tuple[str, str]:
    """(task, text) of an option; without TASK= it is for the only task."""
    task, equals, text = value.partition("=")
    if equals and task in names:
        return task, text
    if equals and task.isidentifier() and not names:
        return task, text
    if len(names) > 1:
        raise UsageError(
            f"{flag} {value[:40]!r} does not say which task it is for",
            hint=f"write TASK={value[:40]} with one of: {', '.join(names)}",
        )
    return (names[0] if names else "caption"), value


def _tell(
    summary: Summary | Exported | ExportedRequests | Imported | Reparsed | Evaluation | Plan,
    as_json: bool,
) -> None:
    if as_json:
        click.echo(json.dumps(summary.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo(summary.as_text())
    for warning in summary.warnings:
        _say("Warning", warning)
