"""What the image processors of tiny checkpoints make of a picture, against what families assume."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("torch", reason="the transformers engine needs torch")
pytest.importorskip("transformers", reason="the transformers engine needs transformers")

from tests.families.native import loaded
from tests.tiny_models import (
    build_aya_vision,
    build_florence2,
    build_fuyu,
    build_gemma3,
    build_idefics3,
    build_kosmos2,
    build_llava,
    build_llava_next,
    build_paligemma,
)
from vlmbatch.families import Family, family_for
from vlmbatch.grounding import Box, Size
from vlmbatch.models import resolve_model
from vlmbatch.records import IMAGE, LoadedImage, Request, TaskKind

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llava": build_llava,
    "llava_next": build_llava_next,
    "kosmos2": build_kosmos2,
    "paligemma": build_paligemma,
    "florence2": build_florence2,
    "gemma3": build_gemma3,
    "aya_vision": build_aya_vision,
    "idefics3": partial(build_idefics3, side=32, split=True),
    "idefics3 in one tile": build_idefics3,
    "fuyu": build_fuyu,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Family, Any]]:
    """The family of a checkpoint, and the checkpoint."""
    folder = tmp_path_factory.mktemp("models")

    def made(name: str) -> tuple[Family, Any]:
        path = folder / name
        if not path.exists():
            BUILDERS[name](path)
        return family_for(resolve_model(str(path)).config), loaded(path)

    return made


def sizes(seed: int, longest: int) -> list[Size]:
    rng = random.Random(seed)
    return [Size(rng.randint(20, longest), rng.randint(20, longest)) for _ in range(20)]


def given(family: Family, picture: Image.Image) -> Image.Image:
    """The picture as the loader hands it over."""
    target = family.target(Size(picture.width, picture.height))
    return family.prepare(picture.resize((target.width, target.height), Image.Resampling.BOX))


def prepared(checkpoint: Any, pixels: Image.Image, size: Size) -> Any:
    request = Request(
        row=0,
        request=0,
        sample=0,
        task="caption",
        kind=TaskKind.CAPTION,
        prompt=f"{IMAGE}<OCR>",
        question=None,
        images=(LoadedImage(pixels, size, "key"),),
    )
    return checkpoint.prepare([request])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's
@pytest.mark.parametrize("name", BUILDERS)
def test_a_prompt_grows_with_its_image_as_the_family_says(name, model):
    family, checkpoint = model(name)
    beside = set()
    for size in sizes(1, 400):
        pixels = given(family, Image.new("RGB", (size.width, size.height)))
        (length,) = prepared(checkpoint, pixels, size).lengths
        beside.add(length - family.image_tokens(size))
    assert len(beside) == 1


def marked(size: Size, rng: random.Random) -> tuple[Image.Image, Box]:
    """A black picture with a white rectangle, each edge of which may be the picture's own."""
    edges = []
    for limit in (size.width, size.height):
        low, high = rng.choice((0, limit // 4)), rng.choice((limit, limit - limit // 4))
        edges.append((low, high))
    (x1, x2), (y1, y2) = edges
    picture = Image.new("RGB", (size.width, size.height), "black")
    ImageDraw.Draw(picture).rectangle((x1, y1, x2 - 1, y2 - 1), fill="white")
    return picture, Box("", x1, y1, x2, y2)


def bright(pixels: Any) -> Box:
    """Where a channels-first picture of any normalisation is white, from 0 to 1 of it."""
    channel = np.asarray(pixels)[0]
    white = channel > (np.min(channel) + np.max(channel)) / 2 + 0.02 * np.ptp(channel)
    if np.ptp(channel) < 0.5:  # white all over
        white = np.ones_like(channel, dtype=bool)
    (rows,), (columns,) = np.nonzero(white.any(axis=1)), np.nonzero(white.any(axis=0))
    height, width = channel.shape
    return Box(
        "", columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    )


STEPS = {"llava": 1, "llava_next": 1, "kosmos2": 1, "paligemma": 1023, "florence2": 1000}
"""The largest number of a box."""


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's
@pytest.mark.parametrize("name", STEPS)
def test_what_the_encoder_sees_lies_where_the_boxes_space_says(name, model):
    """Also what touches the picture's edges: none of it is cut off."""
    family, checkpoint = model(name)
    rng = random.Random(name)
    for size in sizes(2, 400):
        picture, box = marked(size, rng)
        seen = prepared(checkpoint, given(family, picture), size).tensors["pixel_values"][0]
        pixels = seen[0] if name == "llava_next" else seen  # the whole of it is the first tile
        step = max(size.width, size.height) / pixels.shape[-1]  # a pixel of the encoder's
        found = family.space.to_pixels(scaled(bright(pixels), STEPS[name], STEPS[name]), size)
        near(found, box, 1.6 * step)


def test_what_fuyu_sees_lies_in_half_pixels_of_the_resized_picture(model):
    family, checkpoint = model("fuyu")
    rng = random.Random(3)
    for size in [*sizes(3, 1000)[:5], Size(2400, 900), Size(1000, 2200)]:
        picture, box = marked(size, rng)
        images = checkpoint._processor.image_processor([[given(family, picture)]])
        seen = family.target(size)
        pixels = np.asarray(images["images"][0])[..., : seen.height, : seen.width].squeeze()
        half = scaled(bright(pixels), seen.width / 2, seen.height / 2)
        step = max(size.width / seen.width, size.height / seen.height)
        near(family.space.to_pixels(half, size), box, 1.6 * step)


def test_both_readings_of_llavas_boxes_are_of_the_padded_and_of_the_plain_picture(model):
    """The processor cuts the sides of what it is given; padded before, nothing is lost."""
    family, checkpoint = model("llava")
    size = Size(300, 100)
    picture = Image.new("RGB", (size.width, size.height), "white")
    plain = prepared(checkpoint, picture, size).tensors["pixel_values"][0]
    padded = prepared(checkpoint, given(family, picture), size).tensors["pixel_values"][0]
    assert bright(plain) == Box("", 0, 0, 1, 1)  # a third of it, from the middle
    third = bright(padded)
    assert (third.x1, third.x2) == (0, 1)
    assert (third.y1, third.y2) == pytest.approx((1 / 3, 2 / 3), abs=1 / 32)
    squash = family_for({}, "llava", box_space="squash")
    assert family.space.to_pixels(Box("", 0, 1 / 3, 1, 2 / 3), size).y1 == pytest.approx(0, abs=0.5)
    assert squash.space.to_pixels(Box("", 0, 1 / 3, 1, 2 / 3), size).y1 == pytest.approx(100 / 3)


def scaled(box: Box, x: float, y: float) -> Box:
    return Box(box.label, box.x1 * x, box.y1 * y, box.x2 * x, box.y2 * y)


def near(found: Box | None, meant: Box, limit: float) -> None:
    assert found is not None
    for name in ("x1", "y1", "x2", "y2"):
        assert abs(getattr(found, name) - getattr(meant, name)) <= limit, (found, meant)
