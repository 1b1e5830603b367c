"""A run with boxes to export: odd sizes and labels, a turned JPEG, one image in two rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.harness import echo, vlmbatch
from vlmbatch.grounding import Box, Point, Size

QUOTED = 'the "big", red one'
ARBRE = "l'arbre: 木 #1"
GONE = 6
"""The row whose image is missing."""
TURNED = 3


@dataclass(frozen=True)
class Boxed:
    """An output, and what it says about each image, by the colour of its pixels."""

    folder: Path
    manifest: Path

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        table = pq.read_table(self.folder)
        return [row for row in table.to_pylist() if row["status"] == "ok"]

    @cached_property
    def boxes(self) -> dict[str, list[Box]]:
        """All boxes about each image that was looked at, in the order of the rows."""
        found: dict[str, list[Box]] = {}
        for row in self.rows:
            if row["boxes"] is not None:
                found.setdefault(COLOURS[row["row"]], []).extend(Box(**b) for b in row["boxes"])
        return found

    @cached_property
    def points(self) -> dict[str, list[Point]]:
        found: dict[str, list[Point]] = {}
        for row in self.rows:
            if row["points"]:
                found.setdefault(COLOURS[row["row"]], []).extend(Point(**p) for p in row["points"])
        return found

    @cached_property
    def sizes(self) -> dict[str, Size]:
        return {
            COLOURS[row["row"]]: Size(row["image_width"], row["image_height"]) for row in self.rows
        }


PICTURES: list[tuple[str, tuple[int, int], str]] = [
    ("photos/a b.png", (641, 427), "#ff0000"),
    ("photos/sub/one.png", (1, 1), "#00ff00"),
    ("photos/a b.png", (641, 427), "#ff0000"),
    ("photos/turned.jpg", (40, 30), "#0000ff"),
    ("photos/none.png", (64, 3), "#ffff00"),
    ("photos/moving.gif", (33, 1017), "#ff00ff"),
    ("photos/gone.png", (8, 8), "#123456"),
    ("photos/one.png", (1201, 13), "#00ffff"),
]
"""Name, size as stored, colour of each row's image."""
COLOURS = [colour for _, _, colour in PICTURES]

ANSWERS: list[list[dict[str, Any]]] = [
    [
        {"bbox_2d": [0, 0, 1000, 1000], "label": "cat"},
        {"bbox_2d": [13, 501, 333, 707], "label": QUOTED},
    ],
    [{"bbox_2d": [0, 0, 1000, 1000], "label": "cat"}],
    [{"bbox_2d": [998, 0, 1000, 3], "label": "Dog"}],
    [{"bbox_2d": [500, 100, 900, 300], "label": ARBRE}],
    [],
    [{"bbox_2d": [0, 999, 31, 1000], "label": "cat"}, {"point_2d": [500, 250], "label": "nose"}],
    [],
    [{"bbox_2d": [777, 1, 778, 999], "label": ARBRE}],
]


def boxed(place: Path, *options: str, inline: bool = False) -> Boxed:
    """Asked for captions and boxes, answered as a Qwen3-VL would; parts of three rows."""
    place.mkdir(parents=True)
    for row, (name, size, colour) in enumerate(PICTURES):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if row != GONE:
            image = Image.new("RGB", size, colour)
            if row == TURNED:
                exif = Image.Exif()
                exif[0x0112] = 6
                image.save(path, exif=exif, quality=95)
            else:
                image.save(path)
    images: list[Any] = [name for name, _, _ in PICTURES]
    if inline:
        images = [
            {"bytes": (place / name).read_bytes() if (place / name).exists() else b"", "path": "x"}
            for name in images
        ]
    replies = [[f"caption {i}.", f"```json\n{json.dumps(a)}\n```"] for i, a in enumerate(ANSWERS)]
    ids = [f"id-{i}" for i in range(len(images))]
    table = pa.table({"image": images, "id": ids, "reply": replies, "licence": ["cc0"] * len(ids)})
    pq.write_table(table, place / "m.parquet")
    run = vlmbatch(
        *("run", place / "m.parquet", "-t", "caption", "-t", "detect", "--labels", "cat,dog"),
        *(*echo(reply_from="reply"), "--family", "qwen3_vl", "-o", place / "out"),
        *("--max-failure-rate=1", "--part-rows=3", "--carry=licence", *options),
    )
    assert run.exit_code == 0, run
    return Boxed(place / "out", place / "m.parquet")


def colour_of(image: Path | Image.Image) -> str:
    """The nearest of the pictures' colours; of its middle, as JPEG blurs edges."""
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            return colour_of(opened)
    plain = image.convert("RGB")
    pixel = plain.getpixel((plain.width // 2, plain.height // 2))
    assert isinstance(pixel, tuple)

    def distance(colour: str) -> float:
        channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return sum((a - b) ** 2 for a, b in zip(channels, pixel, strict=True))

    best = min(COLOURS, key=distance)
    assert distance(best) < 300, pixel
    return best
