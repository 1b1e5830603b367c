"""easy-VQA (PyPI `easy-vqa`, MIT) as test data: real pictures with questions, answers and boxes.

Each picture is 64x64 px: one shape of one of eight exact colours on a pale ground. Questions are
`[question, answer, image id]` in the package's `data/{train,test}/questions.json`; 4,000 training
pictures with 38,575 questions, 1,000 test pictures with 9,673.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Split = Literal["train", "test"]
Box = tuple[int, int, int, int]

COLOURS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
SHAPES = ("circle", "rectangle", "triangle")
NEAR = 32  # per channel; the ground is further away, a border pixel is near if mostly covered


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known about one picture.

    ``colour`` and ``shape`` are None where no question has them as its answer (the pictures were
    given questions at random); ``box`` is xyxy in pixels, right and lower edges exclusive.
    """

    colour: str | None
    shape: str | None
    box: Box

    @property
    def caption(self) -> str | None:
        return f"a {self.colour} {self.shape}" if self.colour and self.shape else None


def easy_vqa_images(split: Split = "test") -> list[Path]:
    """The pictures in the order of their ids: the n-th is image n."""
    folder = _data() / split / "images"
    return [folder / f"{number}.png" for number in range(len(list(folder.glob("*.png"))))]


@cache
def questions(split: Split = "test") -> list[tuple[str, str, int]]:
    """(question, answer, image id), in the package's order, which is that of the images."""
    return [tuple(entry) for entry in json.loads((_data() / split / "questions.json").read_text())]


@cache
def truth(split: Split = "test") -> dict[int, Truth]:
    """What the questions' answers and the pixels tell about each picture, by image id."""
    colours = {image: answer for _, answer, image in questions(split) if answer in COLOURS}
    shapes = {image: answer for _, answer, image in questions(split) if answer in SHAPES}
    return {
        image: Truth(colours.get(image), shapes.get(image), _box(path, colours.get(image)))
        for image, path in enumerate(easy_vqa_images(split))
    }


def write_manifest(
    path: Path, *, rows: int = 1000, split: Split = "test", with_questions: bool = False
) -> Path:
    """Writes a Parquet manifest of ``image`` (absolute path), ``id`` and, if asked, ``questions``.

    Row n has image n; beyond the last image they begin again, under new ids.
    """
    images = easy_vqa_images(split)
    numbers = [row % len(images) for row in range(rows)]
    columns = {
        "image": pa.array([str(images[number]) for number in numbers], pa.string()),
        "id": pa.array([f"{split}-{row}" for row in range(rows)], pa.string()),
    }
    if with_questions:
        asked: list[list[str]] = [[] for _ in images]
        for question, _, image in questions(split):
            asked[image].append(question)
        columns["questions"] = pa.array([asked[n] for n in numbers], pa.list_(pa.string()))
    pq.write_table(pa.table(columns), path)
    return path


def _data() -> Path:
    with resources.as_file(resources.files("easy_vqa") / "data") as folder:
        return folder


def _box(path: Path, colour: str | None) -> Box:
    """The rectangle around the pixels near the picture's one colour out of the eight.

    Every picture has pixels of exactly one of the eight RGB values (checked for both splits), also
    those whose colour no question names.
    """
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(np.int16)
    present = [name for name, rgb in COLOURS.items() if (pixels == rgb).all(-1).any()]
    if len(present) != 1 or colour not in (None, *present):
        raise ValueError(f"{path} is {colour or 'of no named colour'} and has pixels of {present}")
    near = np.abs(pixels - COLOURS[present[0]]).max(-1) <= NEAR
    ys, xs = np.nonzero(near)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
