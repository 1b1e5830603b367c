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
from vlmbatch.grounding import Box, iou

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
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    summary = json.loads(ended.stdout)
    right: dict[str, list[bool]] = defaultdict(list)
    position: dict[int, int] = defaultdict(int)
    for result in pq.read_table(output).to_pylist():
        image = result["row"]
        if result["task"] == "vqa":
            right["questions"].append(result["text"] == asked[image][position[image]][1])
            position[image] += 1
        elif result["task"] == "caption" and known[image].caption is not None:
            right["captions"].append(result["text"] == known[image].caption)
        elif result["task"] == "ground" and known[image].colour is not None:
            right["boxes"].append(_found(result["boxes"], Box("", *known[image].box)))
    return {
        **{
            task: {"right": sum(hits), "of": len(hits), "share": round(sum(hits) / len(hits), 4)}
            for task, hits in right.items()
        },
        "rows_per_second": summary["rows_per_second"],
        "requests_per_second": round(summary["requests"] / summary["seconds"], 2),
        "seconds": summary["seconds"],
        "model": summary["model"],
    }


def _found(boxes: list[dict[str, float]] | None, wanted: Box) -> bool:
    """Whether the one box that was asked for is there, with IoU >= 0.5."""
    if not boxes or len(boxes) != 1:
        return False
    box = boxes[0]
    return iou(Box("", box["x1"], box["y1"], box["x2"], box["y2"]), wanted) >= 0.5


if __name__ == "__main__":
    main()
