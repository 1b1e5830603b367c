"""Draws pictures of coloured shapes and writes what can be asked about them, with right answers.

Two kinds of pictures: one shape on a pale ground as in easy-VQA, and scenes of one to four shapes
of any size. All boxes are (x1, y1, x2, y2) in 64ths of the picture's width and height, the right
and lower edges exclusive, so that on a picture of 64x64 px they are exact pixels.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

GRID = 64
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
FORMS = ("circle", "rectangle", "triangle")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
LARGE = 20  # a shape is large when its longer side has at least so many 64ths, else small

Box = tuple[int, int, int, int]
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape; its box is the rectangle of the 64x64 px picture's pixels that it fills."""

    colour: str
    form: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.form}"

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def size(self) -> str:
        x1, y1, x2, y2 = self.box
        return "large" if max(x2 - x1, y2 - y1) >= LARGE else "small"

    @property
    def place(self) -> str:
        x, y = self.centre
        return PLACES[min(2, int(3 * y / GRID))][min(2, int(3 * x / GRID))]


def listed(shapes: list[Shape]) -> list[Shape]:
    """The order of every listing: left to right by the box's centre, then top to bottom."""
    return sorted(shapes, key=lambda shape: shape.centre)


# ------------------------------------------------------------------------------------- pictures


def easy_picture(rng: random.Random) -> tuple[Image.Image, list[Shape]]:
    """A 64x64 px picture as easy-VQA draws them: one plain shape of 8 to 32 px on a pale ground."""
    level = rng.randint(230, 255)
    ground = tuple(min(255, max(200, level + rng.randint(-13, 13))) for _ in range(3))
    form, colour = rng.choice(FORMS), rng.choice(list(COLOURS))
    width, height = _sides(form, rng, 8, 32, 1.0)
    x, y = rng.randint(0, 2 * (GRID - width)) / 2, rng.randint(0, 2 * int(GRID - height)) / 2
    corners = (x / GRID, y / GRID, (x + width) / GRID, (y + height) / GRID)
    image = Image.new("RGB", (2 * GRID, 2 * GRID), ground)
    _draw(image, form, corners, COLOURS[colour])
    box = _filled_box(form, corners)
    return image.resize((GRID, GRID), Image.Resampling.BICUBIC), [Shape(colour, form, box)]


def scene_picture(rng: random.Random, count: int | None = None) -> tuple[Image.Image, list[Shape]]:
    """A scene of 1 to 4 shapes that do not touch, 48 to 160 px a side, half of them 64x64 px."""
    count = count or rng.choices((1, 2, 3, 4), (1, 3, 3, 3))[0]
    width, height = (64, 64)
    if rng.random() < 0.5:
        width, height = rng.randint(48, 160), rng.randint(48, 160)
    ground = _ground(rng)
    placed: list[tuple[str, str, tuple[float, float, float, float]]] = []
    for _ in range(200):
        if len(placed) == count:
            break
        form, colour = rng.choice(FORMS), rng.choice(list(COLOURS))
        if max(abs(a - b) for a, b in zip(COLOURS[colour], ground, strict=True)) < 90:
            continue
        if placed and rng.random() < 0.25:  # twins make counting and "on the left" worth asking
            form = rng.choice(placed)[0]
            colour = rng.choice(placed)[1]
        wide, high = _sides(form, rng, 9, (36, 28, 26, 24)[count - 1], height / width)
        wide, high = min(wide, 50), min(high, 50)
        x, y = rng.uniform(0, GRID - wide), rng.uniform(0, GRID - high)
        corners = (x / GRID, y / GRID, (x + wide) / GRID, (y + high) / GRID)
        if all(_apart(corners, other, 2 / GRID) for _, _, other in placed):
            placed.append((form, colour, corners))
    image = Image.new("RGB", (2 * width, 2 * height), ground)
    for form, colour, corners in placed:
        tint = tuple(min(255, max(0, c + rng.randint(-15, 15))) for c in COLOURS[colour])
        _draw(image, form, corners, tint)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    image = _weathered(image, rng)
    shapes = [Shape(colour, form, _filled_box(form, corners)) for form, colour, corners in placed]
    return image, listed(shapes)


def squashed(image: Image.Image) -> np.ndarray:
    """The whole picture as 64x64x3 bytes, its sides scaled apart, as the image processor does."""
    if image.size != (GRID, GRID):
        image = image.resize((GRID, GRID), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _sides(
    form: str, rng: random.Random, low: int, high: int, aspect: float
) -> tuple[float, float]:
    """Width and height in 64ths of a picture of the given height/width, round shapes round."""
    first, second = rng.randint(low, high), rng.randint(low, high)
    if form == "circle":
        second = first
    elif form == "triangle":
        second = first * 3**0.5 / 2
    if aspect == 1.0:
        return first, second
    return first * min(1, aspect), max(6, second * min(1, 1 / aspect))


def _draw(
    image: Image.Image, form: str, corners: tuple[float, float, float, float], fill: object
) -> None:
    wide, high = image.size
    x1, y1, x2, y2 = corners[0] * wide, corners[1] * high, corners[2] * wide, corners[3] * high
    pen = ImageDraw.Draw(image)
    if form == "circle":
        pen.ellipse((x1, y1, x2 - 1, y2 - 1), fill=fill)
    elif form == "rectangle":
        pen.rectangle((round(x1), round(y1), round(x2) - 1, round(y2) - 1), fill=fill)
    else:
        pen.polygon([(x1, y2 - 1), ((x1 + x2 - 1) / 2, y1), (x2 - 1, y2 - 1)], fill=fill)


def _filled_box(form: str, corners: tuple[float, float, float, float]) -> Box:
    mask = Image.new("L", (2 * GRID, 2 * GRID), 0)
    _draw(mask, form, corners, 255)
    return box_of(np.asarray(mask.resize((GRID, GRID), Image.Resampling.BOX)) >= 223)


def box_of(mask: np.ndarray) -> Box:
    """The rectangle around the true pixels of a mask, in pixels, right and lower edge exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def near_colour(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Mask of the pixels whose every channel is within 32 of the colour's exact RGB value."""
    return np.abs(pixels.astype(np.int16) - COLOURS[colour]).max(-1) <= 32


def _ground(rng: random.Random) -> tuple[int, ...]:
    if rng.random() < 0.7:
        level = rng.randint(220, 255)
        return tuple(min(255, max(190, level + rng.randint(-20, 20))) for _ in range(3))
    return tuple(rng.randint(40, 255) for _ in range(3))


def _weathered(image: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() < 0.4:
        return image
    pixels = np.asarray(image, dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = pixels + noise.normal(0, rng.uniform(1, 9), pixels.shape)
    if rng.random() < 0.5:  # light that falls off from one side to the other
        slope = np.linspace(0, rng.uniform(-25, 25), pixels.shape[rng.randint(0, 1)])
        pixels = pixels + (
            slope[:, None, None] if len(slope) == pixels.shape[0] else slope[None, :, None]
        )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _apart(one: tuple[float, ...], other: tuple[float, ...], gap: float) -> bool:
    return (
        one[2] + gap < other[0]
        or other[2] + gap < one[0]
        or one[3] + gap < other[1]
        or other[3] + gap < one[1]
    )


# ------------------------------------------------------------------------- prompts and answers

SHORT, DETAILED = "Describe the image briefly.", "Describe the image in detail."
THERE = (
    "is there a {}?",
    "is there a {} in the image?",
    "does the image contain a {}?",
    "is a {} present?",
)
NOT_THERE = (
    "is there not a {}?",
    "is there not a {} in the image?",
    "does the image not contain a {}?",
    "is no {} present?",
)
COLOUR_OF = ("what color is the {}?", "what is the color of the {}?")
FORM_OF = ("what is the {} shape?", "what shape is the {} object?")
THE_FORM = (
    "what shape does the image contain?",
    "what shape is in the image?",
    "what shape is present?",
)


def caption(shapes: list[Shape], detailed: bool = False) -> str:
    """All shapes left to right, as `a red circle, a blue rectangle and a green triangle`."""
    if detailed:
        parts = [f"a {s.size} {s.name} at the {s.place}" for s in shapes]
    else:
        parts = [f"a {s.name}" for s in shapes]
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def locs(box: Box) -> str:
    return "".join(f"<loc_{edge}>" for edge in box)


def matches(shapes: list[Shape], label: str) -> list[Shape]:
    """The shapes that a label of colour and/or form names; square means rectangle, no more."""
    words = label.replace("square", "rectangle").split()
    return [
        s for s in shapes if all(w in (s.colour, s.form, "shape", "object", "the") for w in words)
    ]


def easy_pairs(shape: Shape, rng: random.Random, count: int) -> list[Pair]:
    """Questions of easy-VQA's 107 about its single shape, yes and no in balance."""
    pairs = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.2:
            noun = rng.choice((shape.form, "shape"))
            pairs.append((rng.choice(COLOUR_OF).format(noun), shape.colour))
        elif kind < 0.4:
            question = rng.choice((*THE_FORM, FORM_OF[0].format(shape.colour)))
            pairs.append((question, shape.form))
        else:
            pairs.append(_existence([shape], rng, pairs_only=False))
    return pairs


def scene_pairs(shapes: list[Shape], rng: random.Random, count: int) -> list[Pair]:
    """Questions about a scene: is there, colour of, shape of, how many, and where to each other."""
    pairs: list[Pair] = []
    for _ in range(20 * count):
        if len(pairs) == count:
            break
        ask = rng.choices((_existence, _colour, _form, _number, _relation), (6, 3, 3, 4, 4))[0]
        pair = ask(shapes, rng)
        if pair and pair not in pairs:
            pairs.append(pair)
    return pairs


def _existence(shapes: list[Shape], rng: random.Random, pairs_only: bool = True) -> Pair:
    colours, forms = {s.colour for s in shapes}, {s.form for s in shapes}
    kind, present = rng.choice(("colour", "form", "both")), rng.random() < 0.5
    if not pairs_only:
        kind = rng.choice(("colour", "colour", "form"))
    if kind == "form" and len(forms) == len(FORMS):
        present = True
    if kind == "colour":
        colour = rng.choice([c for c in COLOURS if (c in colours) == present])
        noun = f"{colour} shape"
    elif kind == "form":
        noun = rng.choice([f for f in FORMS if (f in forms) == present])
    else:
        names = {s.name for s in shapes}
        near = [f"{c} {f}" for c in colours for f in forms]
        if rng.random() < 0.4:
            near = [f"{c} {f}" for c in COLOURS for f in FORMS]
        near = [n for n in near if (n in names) == present] or sorted(names)
        noun = rng.choice(sorted(near))
        present = noun in names
    if rng.random() < 0.5:
        return rng.choice(THERE).format(noun), "yes" if present else "no"
    return rng.choice(NOT_THERE).format(noun), "no" if present else "yes"


def _colour(shapes: list[Shape], rng: random.Random) -> Pair | None:
    shape = rng.choice(shapes)
    nouns = [noun for noun in (shape.form, "shape") if len(matches(shapes, noun)) == 1]
    return (rng.choice(COLOUR_OF).format(rng.choice(nouns)), shape.colour) if nouns else None


def _form(shapes: list[Shape], rng: random.Random) -> Pair | None:
    shape = rng.choice(shapes)
    if len(matches(shapes, shape.colour)) > 1:
        return None
    return rng.choice(FORM_OF).format(shape.colour), shape.form


def _number(shapes: list[Shape], rng: random.Random) -> Pair:
    kind, shape = rng.choice(("all", "colour", "form")), rng.choice(shapes)
    if kind == "all":
        return "how many shapes are there?", str(len(shapes))
    if kind == "colour":
        colour = shape.colour if rng.random() < 0.75 else rng.choice(list(COLOURS))
        noun, number = f"{colour} shape", len(matches(shapes, colour))
    else:
        noun = shape.form if rng.random() < 0.75 else rng.choice(FORMS)
        number = len(matches(shapes, noun))
    return f"how many {noun}s are there?", str(number)


def _relation(shapes: list[Shape], rng: random.Random) -> Pair | None:
    alone = [s for s in shapes if len(matches(shapes, s.name)) == 1]
    if len(alone) < 2:
        return None
    one, other = rng.sample(alone, 2)
    axis = rng.randint(0, 1)
    apart = other.centre[axis] - one.centre[axis]
    if abs(apart) < 4:
        return None
    words = (("to the left of", "to the right of"), ("above", "below"))[axis]
    word = rng.choice(words)
    right = (apart > 0) == (word == words[0])
    return f"is the {one.name} {word} the {other.name}?", "yes" if right else "no"


def locate_pair(shapes: list[Shape], rng: random.Random, plain: bool = False) -> Pair:
    """`Locate: the red circle` and the boxes, left to right, joined by `;`, or none."""
    side = rng.choice(("on the left", "on the right", "at the top", "at the bottom"))
    label = _label(shapes, rng, 0.85)
    found = matches(shapes, label)
    label = _with_synonym(label, rng)
    noun = label if label.split()[-1] in (*FORMS, "square") else f"{label} shape"
    if rng.random() < 0.15:
        label, found, noun = "shape", shapes, "shape"
    if not plain and found and rng.random() < (0.6 if len(found) > 1 else 0.1):
        x_or_y = int(side.startswith("at"))
        pick = min if side in ("on the left", "at the top") else max
        edges = sorted(s.centre[x_or_y] for s in found)
        rivals = edges[:2] if pick is min else edges[-2:]
        if len(found) == 1 or rivals[1] - rivals[0] >= 4:
            found = [pick(found, key=lambda s: s.centre[x_or_y])]
            noun = f"{noun} {side}"
    phrase = f"the {noun}" if rng.random() < 0.5 else noun
    return f"Locate: {phrase}", ";".join(locs(s.box) for s in found) or "none"


def detect_pair(shapes: list[Shape], rng: random.Random) -> Pair:
    """`Detect: red circle, triangle` and, label by label, every shape found, or none."""
    labels: list[str] = []
    for _ in range(rng.choices((1, 2, 3, 4), (2, 3, 2, 1))[0]):
        label = _with_synonym(_label(shapes, rng, 0.65), rng)
        if label not in labels:
            labels.append(label)
    found = [label + locs(s.box) for label in labels for s in matches(shapes, label)]
    return f"Detect: {', '.join(labels)}", ";".join(found) or "none"


def _label(shapes: list[Shape], rng: random.Random, present: float) -> str:
    kind = rng.choices(("colour", "form", "both"), (1, 1, 3))[0]
    shape = rng.choice(shapes)
    colour, form = shape.colour, shape.form
    if rng.random() >= present:
        colour = rng.choice(list(COLOURS))
        form = rng.choice(FORMS)
    return {"colour": colour, "form": form, "both": f"{colour} {form}"}[kind]


def _with_synonym(label: str, rng: random.Random) -> str:
    return label.replace("rectangle", "square") if rng.random() < 0.25 else label


def sentences() -> Iterator[str]:
    """Text that holds every word of the corpus, for the tokenizer's training."""
    rng = random.Random(0)
    for count in range(4000):
        shapes = (easy_picture if count % 2 else scene_picture)(rng)[1]
        for question, answer in [
            (SHORT, caption(shapes)),
            (DETAILED, caption(shapes, True)),
            *easy_pairs(shapes[0], rng, 2),
            *scene_pairs(shapes, rng, 3),
            locate_pair(shapes, rng),
            detect_pair(shapes, rng),
        ]:
            yield question
            yield question[0].upper() + question[1:]
            yield answer
            yield "User:"
            yield "\nAssistant:"
