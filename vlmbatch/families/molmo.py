"""Molmo: points in percent, ``<point x="63.5" y="44.6" alt="dogs">dogs</point>``, and no boxes.

Several: ``<points x1="10.2" y1="20.1" x2="30.0" y2="40.5" alt="dogs">dogs</points>``; none: "There
are none." Source: olmo/data/data_formatter.py and olmo/util.py of allenai/molmo. That Molmo 2
writes the same is not verified.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlmbatch.families.base import (
    ALL_TASKS,
    Chat,
    Entry,
    answered,
    wanted,
    words_beside,
)
from vlmbatch.families.json_boxes import Found, default_label, placed
from vlmbatch.grounding import GridSpace, Point, Space
from vlmbatch.records import IMAGE, Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

_TAG = re.compile(r"</?points?\b[^<>]*+(?:>|\Z)")
_OPENING = re.compile(r"<points?\b([^<>]*+)(?:>([^<>]*+))?")
_ALT = re.compile(r"""\balt\s*+=\s*+(?:"([^"]*+)"?|'([^']*+)'?)""")
_EDGE = re.compile(r"""\b([xy])(\d{0,4})\s*+=\s*+["'](-?\d{1,6}(?:\.\d{0,9})?)\s*+["']""")


class Molmo2(Chat):
    """Both: ground and detect are answered with points."""

    name = "molmo2"
    space: Space = GridSpace(100)

    def word_boxes(self, ask: Ask) -> str:
        return f"Point to the {wanted(ask).removeprefix('the ')}."

    def plain(self, text: str) -> str:
        return words_beside(_TAG, text)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        answer = answered(text)
        return placed(_points(answer, default_label(kind, labels)), answer, self.space, image)

    def write_points(self, points: Sequence[Point], *, image: LoadedImage) -> str:
        """As ``write`` for boxes; a label's points stand in one tag."""
        named: dict[str, list[Point]] = {}
        for point in points:
            own = self.space.point_from_pixels(point, image.size)
            named.setdefault(point.label, []).append(own)
        tags = []
        for label, own_points in named.items():
            edges = " ".join(
                f'x{i}="{p.x:.1f}" y{i}="{p.y:.1f}"' for i, p in enumerate(own_points, 1)
            )
            tags.append(f'<points {edges} alt="{label}">{label}</points>')
        return " ".join(tags) or "There are none."


class Molmo(Molmo2):
    """Molmo 1: a raw prompt, the image apart from it."""

    name = "molmo"
    raw = True

    def word(self, ask: Ask) -> str:
        return f"{IMAGE} User: {super().word(ask)} Assistant:"


def _points(text: str, default: str) -> Found:
    """Every x with the y of its number."""
    found = Found([], [])
    for tag in _OPENING.finditer(text):
        alt = _ALT.search(tag[1])
        named = (alt[1] or alt[2] or "") if alt else (tag[2] or "")
        xs: dict[str, float] = {}
        ys: dict[str, float] = {}
        for axis, number, value in _EDGE.findall(_ALT.sub("", tag[1])):
            (xs if axis == "x" else ys)[number] = float(value)
        label = default or named.strip()
        found.points.extend(Point(label, x, ys[at]) for at, x in xs.items() if at in ys)
    return found


ENTRIES = (
    Entry(
        name=Molmo.name,
        checkpoints=("allenai/Molmo-*", "allenai/MolmoE-*"),
        tasks=ALL_TASKS,
        boxes='points, no boxes: <point x="63.5" y="44.6" alt="..">, 0 to 100',
        evidence="documented",
        architectures=("MolmoForCausalLM",),
        matches=lambda config, model: config.get("model_type") == "molmo",
        make=lambda config: Molmo(),
        own_code=True,
        requirements=(
            "transformers==4.45.2",
            "tokenizers==0.20.3",
            "huggingface_hub==0.36.2",
            "einops==0.8.1",
        ),
        note="its own code needs torchvision too; vLLM has the model",
    ),
    Entry(
        name=Molmo2.name,
        checkpoints=("allenai/Molmo2-*",),
        tasks=ALL_TASKS,
        boxes='points, no boxes: <point x="63.5" y="44.6" alt="..">, 0 to 100',
        evidence="unverified",
        architectures=("Molmo2ForConditionalGeneration",),
        matches=lambda config, model: config.get("model_type") == "molmo2",
        make=lambda config: Molmo2(),
        own_code=True,
        note="that it writes its points as Molmo did is not verified",
    ),
)
