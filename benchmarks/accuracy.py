"""The demo model against easy-VQA's test split, through the command line.

9,673 published questions; captions of the 603 pictures whose questions name colour and shape; boxes
of the 790 whose colour is named. Prints JSON; ``make accuracy`` writes benchmarks/accuracy.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.easy_vqa_data import easy_vqa_images, questions, truth

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help="write benchmarks/accuracy.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scores = measure(Path(folder), options.rows)
    text = json.dumps(scores, indent=1)
    print(text)
    if options.write:
        (HERE / "accuracy.json").write_text(text + "\n")


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """Run the first ``rows`` test pictures through ``vlmbatch run``; shares of right answers."""
    known = truth("test")
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in questions("test"):
        asked[image].append((question, answer))
    manifest, output = folder / "easy-vqa.parquet", folder / "out"
    pq.write_table(
        pa.table(
            {
                "image": [str(path) for path in easy_vqa_images("test")[:rows]],
                "questions": pa.array(
                    [[q for q, _ in asked[n]] for n in range(rows)], pa.list_(pa.string())
                ),
                "phrase": [
                    f"the {known[n].colour} {known[n].shape or 'shape'}" if known[n].colour else "x"
                    for n in range(rows)
                ],
            }
        ),
        manifest,
    )
    command = [sys.executable, "-m", "vlmbatch", "run", str(manifest), "-m", "demo", "--json"]
    command += ["-o", str(output), "-t", "caption", "-t", "vqa", "-t", "ground"]
    command += ["--max-failure-rate", "1"]
    summary = _json_of(command)
    write_references(folder / "references.jsonl", rows)
    command = [sys.executable, "-m", "vlmbatch", "eval", str(output), "--json", "--show", "0"]
    tasks = _json_of([*command, "--references", str(folder / "references.jsonl")])["tasks"]
    called = {"captions": "caption", "questions": "vqa", "boxes": "ground"}
    shares = {
        name: {
            "right": tasks[task]["right"],
            "of": tasks[task]["n"],
            "share": round(tasks[task]["accuracy"], 4),
        }
        for name, task in called.items()
    }
    return {
        **shares,
        "rows_per_second": summary["rows_per_second"],
        "requests_per_second": round(summary["requests"] / summary["seconds"], 2),
        "seconds": summary["seconds"],
        "model": summary["model"],
    }


def write_references(path: Path, rows: int) -> None:
    """What is known of the first ``rows`` test pictures, for ``vlmbatch eval``; request 0 of each
    is the caption, and the next ones are its questions."""
    asked: dict[int, int] = defaultdict(int)
    references: list[dict[str, Any]] = []
    for _, answer, row in questions("test"):
        if row < rows:
            asked[row] += 1
            references.append({"row": row, "request": asked[row], "text": answer})
    for row, known in truth("test").items():
        if row < rows and known.caption is not None:
            references.append({"row": row, "task": "caption", "text": known.caption})
        if row < rows and known.colour is not None:
            box = dict(zip(("x1", "y1", "x2", "y2"), known.box, strict=True))
            references.append({"row": row, "task": "ground", "boxes": [box]})
    path.write_text("".join(json.dumps(each) + "\n" for each in references))


def _json_of(command: list[str]) -> Any:
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    main()
