"""The main job on real input: 200 easy-VQA pictures, the bundled model; captions, answers, boxes.

``make demo`` runs this. It is the command that a user would type; run it again and it resumes.
"""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 200
HERE = Path("demo-output")
MANIFEST, OUTPUT = HERE / "easy-vqa.parquet", HERE / "answers"


def main() -> None:
    HERE.mkdir(exist_ok=True)
    if not MANIFEST.exists():
        write_manifest()
    command = ["run", str(MANIFEST), "-m", "demo", "-o", str(OUTPUT)]
    command += [
        "-t",
        "caption",
        "-t",
        "vqa",
        "-t",
        "detect",
        "--labels",
        "circle,rectangle,triangle",
    ]
    print("$ vlmbatch", " ".join(command), flush=True)
    ended = subprocess.run([sys.executable, "-m", "vlmbatch", *command])
    if ended.returncode:
        sys.exit(ended.returncode)
    print(f"\nthe first three rows of {OUTPUT}/part-00000.parquet:\n")
    show(rows=3)


def write_manifest() -> None:
    """The test pictures' paths, and the questions that easy-VQA publishes about each of them."""
    data = Path(str(resources.files("easy_vqa"))) / "data" / "test"
    asked: dict[int, list[str]] = {}
    for question, _, image in json.loads((data / "questions.json").read_text()):
        asked.setdefault(image, []).append(question)
    pq.write_table(
        pa.table(
            {
                "image": [str(data / "images" / f"{n}.png") for n in range(ROWS)],
                "id": [f"easy-vqa-test-{n}" for n in range(ROWS)],
                "questions": [asked.get(n, [])[:3] for n in range(ROWS)],
            }
        ),
        MANIFEST,
    )


def show(rows: int) -> None:
    """Print the results of the first rows."""
    results = pq.read_table(OUTPUT, columns=["row", "id", "task", "question", "text", "boxes"])
    for result in results.to_pylist():
        if result["row"] >= rows:
            return
        if result["task"] == "caption":
            print(result["id"])
        asked = "" if result["question"] is None else f"{result['question']}  ->  "
        answer = result["text"]
        if answer is None:
            answer = ", ".join(
                "{label} [{x1:g}, {y1:g}, {x2:g}, {y2:g}]".format(**box) for box in result["boxes"]
            )
        print(f"    {result['task']:<8} {asked}{answer or 'nothing'}")


if __name__ == "__main__":
    main()
