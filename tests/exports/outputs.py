"""Finished runs to export from: every way in which a manifest may have its images."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.harness import echo, picture, vlmbatch

ROWS = 6
GONE = 4
"""The row whose image is not there: its results have failed."""
COLOURS = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff", "#00ffff"]
SECOND = "#808080"
"""The second image of a row that has two."""
PAIRED = (1, 3)
"""The rows that have two in ``some_pairs``."""
TASKS = ("caption", "vqa", "detect")


@dataclass(frozen=True)
class Finished:
    """An output of TASKS in ``folder``, and what it says about each row."""

    folder: Path
    has_pairs: bool = False

    @property
    def rows(self) -> list[int]:
        """Those that succeeded, but for boxes in two images."""
        return [row for row in range(ROWS) if row != GONE]

    def colours(self, row: int) -> list[str]:
        """Of its images."""
        return [COLOURS[row], SECOND] if self.has_pairs and row in PAIRED else [COLOURS[row]]

    def answers(self, row: int) -> dict[str, str]:
        """By task; a box as ``box_text`` has it."""
        if row == GONE:
            return {}
        found = {"caption": f"caption {row}.", "vqa": f"answer {row}"}
        if len(self.colours(row)) == 1:
            found["detect"] = box_text("cat", 0, 0, 6, 2 * (row % 3 + 1))
        return found


def box_text(label: str, *edges: float) -> str:
    """A box in pixels, as a text to compare."""
    return " ".join([label, *(f"{edge:.2f}" for edge in edges)])


def square(colour: str, **save: Any) -> bytes:
    return picture(12, 8, colour, **save)


def colour_of(data: bytes | Image.Image) -> str:
    """Of a picture of one colour; that of its middle, as JPEG blurs edges."""
    image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))
    red, green, blue = image.convert("RGB").getpixel((6, 4))  # type: ignore[misc]
    return f"#{red:02x}{green:02x}{blue:02x}"


def manifest_of(images: list[Any], kind: pa.DataType | None = None) -> pa.Table:
    rows = len(images)
    return pa.table(
        {
            "image": pa.array(images, kind),
            "id": [f"id-{i}" for i in range(rows)],
            "question": [f"question {i}?" for i in range(rows)],
            "reply": [[f"caption {i}.", f"answer {i}", _said_box(i)] for i in range(rows)],
            "licence": ["cc-by-4.0"] * rows,
            "messages": [{"n": i, "words": ["mine"]} for i in range(rows)],
        }
    )


def _said_box(row: int) -> str:
    """As a Qwen3-VL says it, in thousandths of the image."""
    return f'[{{"bbox_2d": [0, 0, 500, {250 * (row % 3 + 1)}], "label": "cat"}}]'


def write_pictures(folder: Path) -> list[str]:
    """Their names; that of the row GONE has none."""
    folder.mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        if i != GONE:
            (folder / f"{i}.png").write_bytes(square(colour))
    (folder / "second.png").write_bytes(square(SECOND))
    return [f"{folder.name}/{i}.png" for i in range(ROWS)]


def paths(place: Path) -> Path:
    names = write_pictures(place / "photos")
    pq.write_table(manifest_of(names), place / "manifest.parquet")
    return place / "manifest.parquet"


def inline(place: Path) -> Path:
    """The struct of Hugging Face, whose path is no file."""
    place.mkdir(parents=True)
    images = [
        {"bytes": b"" if i == GONE else square(colour), "path": f"{i}.png"}
        for i, colour in enumerate(COLOURS)
    ]
    pq.write_table(manifest_of(images), place / "manifest.parquet")
    return place / "manifest.parquet"


def pairs(place: Path) -> Path:
    names = write_pictures(place / "photos")
    images = [[name, "photos/second.png"] for name in names]
    pq.write_table(manifest_of(images), place / "manifest.parquet")
    return place / "manifest.parquet"


def some_pairs(place: Path) -> Path:
    names = write_pictures(place / "photos")
    images = [[name, "photos/second.png"][: 1 + (row in PAIRED)] for row, name in enumerate(names)]
    pq.write_table(manifest_of(images), place / "manifest.parquet")
    return place / "manifest.parquet"


def on_s3(place: Path, fs: Any, bucket: str) -> str:
    """The same as ``paths``, as objects of a bucket."""
    paths(place)
    fs.mkdir(bucket)
    fs.put(str(place / "manifest.parquet"), f"{bucket}/manifest.parquet")
    fs.put(f"{place}/photos/", f"{bucket}/photos/", recursive=True)
    return f"s3://{bucket}/manifest.parquet"


def answered(manifest: Path | str, output: Path, *options: str | Path, boxes: bool = False) -> Path:
    """A run of captions and questions (and ``boxes``) over it, with known answers."""
    detect = ("-t", "detect", "--labels", "cat", "--family", "qwen3_vl") if boxes else ()
    run = vlmbatch(
        *("run", manifest, "-t", "caption", "-t", "vqa", *detect, *echo(reply_from="reply")),
        *("-o", output, "--carry", "licence", "--carry", "messages"),
        *("--max-failure-rate", "1", "--part-rows", "4", *options),
    )
    assert run.exit_code == 0, run
    return output
