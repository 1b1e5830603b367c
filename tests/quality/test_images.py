"""Images that look the same, whatever was done to their files; and those that do not."""

from __future__ import annotations

import io
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from vlmbatch.quality.images import DISTANCE, ImageHash, hash_of, near_duplicates

SIZE = (240, 160)
COLOURS = ["red", "green", "blue", "yellow", "white", "black", "orange", "purple"]


def photo(seed: int) -> Image.Image:
    """Large soft shapes with fine noise over them, as photographs have."""
    chance = random.Random(seed)
    soft = Image.frombytes("RGB", (6, 4), chance.randbytes(72)).resize(SIZE, 3)
    noise = Image.frombytes("RGB", SIZE, chance.randbytes(SIZE[0] * SIZE[1] * 3))
    return Image.blend(soft, noise, 0.05)


def drawing(seed: int) -> Image.Image:
    """A plain shape on a plain ground."""
    chance = random.Random(seed)
    ground, colour = chance.sample(COLOURS, 2)
    image = Image.new("RGB", (64, 64), ground)
    x, y, side = chance.randrange(40), chance.randrange(40), chance.randrange(10, 24)
    shape = chance.choice(["ellipse", "rectangle"])
    getattr(ImageDraw.Draw(image), shape)((x, y, x + side, y + side), fill=colour)
    return image


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def with_mark(image: Image.Image) -> Image.Image:
    marked = image.copy()
    width, height = marked.size
    ImageDraw.Draw(marked).rectangle((width - 24, height - 8, width, height), fill="white")
    return marked


COPIES = {
    "JPEG 40": lambda image: recompressed(image, 40),
    "a third of the size": lambda image: image.resize((80, 53), Image.Resampling.LANCZOS),
    "5 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.05),
    "with a mark in a corner": with_mark,
}


def test_copies_of_photos_are_found_and_different_ones_are_not() -> None:
    photos = {seed: photo(seed) for seed in range(40)}
    originals = {seed: hash_of(image) for seed, image in photos.items()}
    for name, copy in COPIES.items():
        near = [originals[seed].is_near(hash_of(copy(photos[seed]))) for seed in originals]
        print(f"{name}: {sum(near)} of {len(near)}")
        assert sum(near) >= 0.9 * len(near), name
    pairs = [(a, b) for a in originals for b in originals if a < b]
    assert not [(a, b) for a, b in pairs if originals[a].is_near(originals[b])]


def test_drawings_in_other_colours_or_places_are_other_images() -> None:
    images = {drawing(seed).tobytes(): drawing(seed) for seed in range(150)}
    hashes = [hash_of(image) for image in images.values()]
    near = sum(a.is_near(b) for i, a in enumerate(hashes) for b in hashes[:i])
    pairs = len(hashes) * (len(hashes) - 1) // 2
    print(f"{near} of {pairs} pairs of different drawings")
    assert near <= pairs / 1000
    plain = [hash_of(Image.new("RGB", (20, 30), colour)) for colour in COLOURS]
    assert not any(a.is_near(b) for i, a in enumerate(plain) for b in plain[:i])


def test_any_mode_and_size_has_a_hash() -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "LA"):
        for size in ((1, 1), (1, 500), (500, 1), (9, 9)):
            assert isinstance(hash_of(Image.new(mode, size)), ImageHash)


@st.composite
def hash_lists(draw: st.DrawFn) -> list[ImageHash]:
    """Some bases, and others a few bits and colours away: at, below and above the limits."""
    bases = draw(st.lists(st.integers(0, 2**128 - 1), min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(1, 25))):
        bits = draw(st.sampled_from(bases))
        for bit in draw(st.sets(st.integers(0, 127), max_size=DISTANCE + 2)):
            bits ^= 1 << bit
        level = draw(st.sampled_from([100, 104, 108, 109, 140]))
        found.append(ImageHash(bits >> 64, bits % 2**64, (level, 100, 100)))
    return found


@settings(max_examples=10)
@given(hash_lists())
def test_nearness_in_the_database_is_nearness_one_by_one(hashes: list[ImageHash]) -> None:
    kept: list[tuple[int, ImageHash]] = []
    expected = []
    for row, found in enumerate(hashes):
        near = next((r for r, other in kept if found.is_near(other)), None)
        if near is None:
            kept.append((row, found))
        else:
            expected.append(row)
    found_rows = list(near_duplicates(enumerate(hashes)))
    assert [row for row, _ in found_rows] == expected
    for row, earlier in found_rows:
        assert earlier < row
        assert earlier not in expected
        assert hashes[row].is_near(hashes[earlier]) or hashes[row] in hashes[:row]
