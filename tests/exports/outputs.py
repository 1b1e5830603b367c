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


@dataclass(frozen=True)
class Finished:
    """An output in ``folder``; about each row that succeeded: its images' colours, its texts."""

    folder: Path
    kind: str

    @property
    def rows(self) -> list[int]:
        return [row for row in range(ROWS) if row != GONE]

    @property
    def several(self) -> bool:
        return self.kind == "pairs"

    def colours(self, row: int) -> list[str]:
        return [COLOURS[row], SECOND] if self.several else [COLOURS[row]]

    @staticmethod
    def texts(row: int) -> list[str]:
        return [f"caption {row}.", f"answer {row}"]


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
            "reply": [[f"caption {i}.", f"answer {i}"] for i in range(rows)],
            "licence": ["cc-by-4.0"] * rows,
            "messages": [{"n": i, "words": ["mine"]} for i in range(rows)],
        }
    )


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


def on_s3(place: Path, fs: Any, bucket: str) -> str:
    """The same as ``paths``, as objects of a bucket."""
    paths(place)
    fs.mkdir(bucket)
    fs.put(str(place / "manifest.parquet"), f"{bucket}/manifest.parquet")
    fs.put(f"{place}/photos/", f"{bucket}/photos/", recursive=True)
    return f"s3://{bucket}/manifest.parquet"


def answered(manifest: Path | str, output: Path, *options: str | Path) -> Path:
    """A run of captions and questions over it, with known answers."""
    run = vlmbatch(
        *("run", manifest, "-t", "caption", "-t", "vqa", *echo(reply_from="reply"), "-o", output),
        *(
            "--carry",
            "licence",
            "--carry",
            "messages",
            "--max-failure-rate",
            "1",
            "--part-rows",
            "4",
            *options,
        ),
    )
    assert run.exit_code == 0, run
    return output
