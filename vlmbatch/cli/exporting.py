"""Commands for what leaves an output and what comes back: export, import-batch."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from vlmbatch.cli.program import clean_errors, tell
from vlmbatch.cli.values import pairs, text_of, words
from vlmbatch.errors import UsageError


@click.command()
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
    callback=words,
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
    callback=pairs,
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
    imagefolder    images and metadata.jsonl, which `datasets` reads as a folder
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
        tell(export_requests(output, destination, overwrite=overwrite, model=model), as_json)
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
            system=None if options["system"] is None else text_of(options["system"]),
            user=_user_words(options["user_templates"], options["paraphrases"]),
            for_model=options["for_model"],
        ),
        options={**options["format_args"], **boxes},
    )
    tell(
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


def _user_words(templates: tuple[str, ...], paraphrases: str | None) -> dict[str, tuple[str, ...]]:
    from vlmbatch.exports.conversations import paraphrases_in

    words = paraphrases_in(paraphrases) if paraphrases is not None else {}
    for value in templates:
        task, equals, text = value.partition("=")
        named = bool(equals) and re.fullmatch(r"[\w.-]+", task) is not None
        words |= {task: (text_of(text),)} if named else {"": (text_of(value),)}
    return words


@click.command("import-batch")
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
    tell(summary, as_json)
    sys.exit(summary.exit_code)
