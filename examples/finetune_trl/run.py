"""Labels made with vlmbatch teach a model German: pictures -> labels -> training -> score.

``make finetune`` runs this; each command that it prints is one that you would type. The student is
the bundled model, which captions shapes in English; the pictures are easy-VQA's, trained on those
of its train split and scored on its test split.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata, resources
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmbatch.models import demo_path

HERE = Path(__file__).parent
GERMAN = ["-t", "german", "--prompt", "german=Beschreibe das Bild kurz."]
ENGLISH = ["-t", "caption", "-t", "vqa"]
QUESTIONS = 2  # of a picture's published questions

COLOURS = {
    "black": "schwarz",
    "blue": "blau",
    "brown": "braun",
    "gray": "grau",
    "green": "grün",
    "red": "rot",
    "teal": "blaugrün",
    "yellow": "gelb",
}
FORMS = {"circle": ("er", "Kreis"), "rectangle": ("es", "Rechteck"), "triangle": ("es", "Dreieck")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("finetune-output"))
    parser.add_argument("--pictures", type=int, default=1600, help="labelled by the teacher")
    parser.add_argument("--replay", type=int, default=400, help="of these, labelled by the student")
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--max-steps", type=int, default=-1, help="of training, for a short try")
    parser.add_argument("--write", action="store_true", help="write result.json beside this file")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    os.chdir(args.work)
    began = time.monotonic()

    write_data("train", args.pictures)
    write_data("test", args.held_out)
    # The teacher: answers recorded beforehand, where a large model would be asked.
    teacher = ["--engine", "echo", "--engine-arg", "reply_from=recorded"]
    vlmbatch("run", "train.parquet", "-m", "demo", *teacher, *GERMAN, "-o", "german")
    vlmbatch("export", "german", "--to", "trl", "german-trl")
    # What the student can do already, in its own words, so that training does not undo it.
    vlmbatch("run", "train.parquet", "-m", "demo", "--limit", args.replay, *ENGLISH, "-o", "replay")
    vlmbatch("export", "replay", "--to", "trl", "replay-trl", "--conversation", "per-request")

    started = time.monotonic()
    train = [HERE / "train.py", "german-trl", "replay-trl", "--model", demo_path()]
    train += ["--to", "trained", "--max-steps", args.max_steps]
    print("\n$ python", shlex.join(map(str, train)), flush=True)
    subprocess.run([sys.executable, *map(str, train)], check=True)
    training = time.monotonic() - started

    # Before the training some answers in German are empty: failed rows, and wrong answers here.
    ask = ["run", "test.parquet", *GERMAN, *ENGLISH]
    vlmbatch(*ask, "-m", "demo", "--max-failure-rate", 1, "-o", "before")
    vlmbatch(*ask, "-m", "./trained", "--overwrite", "-o", "after")  # it may be another one now
    result = {
        "before": score("before"),
        "after": score("after"),
        "labels": {"german": args.pictures, "replay": args.replay * (1 + QUESTIONS)},
        "training_seconds": round(training),
        "seconds": round(time.monotonic() - began),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("trl", "transformers", "torch")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.write:
        (HERE / "result.json").write_text(text + "\n")


def pictures(split: str) -> Iterator[tuple[Path, list[tuple[str, str]], str, str]]:
    """Those whose colour and form easy-VQA's answers tell: (file, questions with answers, and both
    words)."""
    data = Path(str(resources.files("easy_vqa"))) / "data" / split
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, number in json.loads((data / "questions.json").read_text()):
        asked[number].append((question, answer))
    for number, pairs in sorted(asked.items()):
        answers = {answer for _, answer in pairs}
        colour, form = answers & COLOURS.keys(), answers & FORMS.keys()
        if colour and form:
            yield data / "images" / f"{number}.png", pairs[:QUESTIONS], colour.pop(), form.pop()


def write_data(split: str, rows: int) -> None:
    """The manifest ``<split>.parquet`` and what is right, ``<split>-references.parquet``."""
    manifest, references = [], []
    for image, pairs, colour, form in islice(pictures(split), rows):
        ending, noun = FORMS[form]
        german, row = f"ein {COLOURS[colour]}{ending} {noun}", f"{split}-{image.stem}"
        questions, answers = zip(*pairs, strict=True)
        manifest.append(
            {"id": row, "image": str(image), "questions": questions, "recorded": german}
        )
        right = [german, f"a {colour} {form}", *answers]
        references += [{"id": row, "request": n, "text": text} for n, text in enumerate(right)]
    pq.write_table(pa.Table.from_pylist(manifest), f"{split}.parquet")
    pq.write_table(pa.Table.from_pylist(references), f"{split}-references.parquet")


def vlmbatch(*words: object) -> None:
    print("\n$ vlmbatch", shlex.join(map(str, words)), flush=True)
    subprocess.run([sys.executable, "-m", "vlmbatch", *map(str, words)], check=True)


def score(output: str) -> dict[str, Any]:
    """Of each task, as ``vlmbatch eval`` has it: right answers word for word."""
    command = ["eval", output, "--references", "test-references.parquet", "--json"]
    print("\n$ vlmbatch", shlex.join(command), flush=True)
    said = subprocess.check_output([sys.executable, "-m", "vlmbatch", *command])
    return json.loads(said)["tasks"]


if __name__ == "__main__":
    main()
