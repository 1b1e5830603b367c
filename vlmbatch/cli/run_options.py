"""The options of `run`, which `plan` and `doctor` take as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from vlmbatch.cli.values import notify_url, pairs, words

NOTIFY_OPTION = click.option(
    "--notify-url",
    metavar="URL|@FILE",
    callback=notify_url,
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
        callback=pairs,
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
        "--labels", callback=words, help="What to detect: a,b,c; without a labels column."
    ),
    click.option(
        "--column",
        "columns",
        multiple=True,
        callback=pairs,
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
        callback=pairs,
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


def with_options(options: list[Callable[..., Any]]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
