"""No image is in two splits, whatever rows share it, and a split does not depend on their order."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import echo, picture, vlmbatch, write_manifest
from vlmbatch.exports.splits import Groups, Splits, number_of
from vlmbatch.records import ImageRef

SPLITS = Splits("train=0.5,val=0.3,test=0.2")
rows_of_images = st.lists(
    st.lists(st.integers(0, 30).map(str), min_size=1, max_size=4).map(tuple), max_size=40
)


def refs(names: tuple[str, ...]) -> tuple[ImageRef, ...]:
    return tuple(ImageRef(uri=name) for name in names)


def split_of(groups: Groups, name: str) -> str:
    return SPLITS.at(groups.of(ImageRef(uri=name)))


def groups_of(rows: list[tuple[str, ...]]) -> Groups:
    return Groups(refs(row) for row in rows if len(row) > 1)


@given(rows_of_images, st.randoms(use_true_random=False))
def test_every_image_is_in_one_split_whatever_the_order_of_rows(
    rows: list[tuple[str, ...]], rng: random.Random
) -> None:
    groups = groups_of(rows)
    for row in rows:
        assert len({split_of(groups, name) for name in row}) == 1
    again = groups_of(rng.sample(rows, len(rows)))
    assert all(split_of(groups, str(n)) == split_of(again, str(n)) for n in range(31))
    several = {name for row in rows if len(row) > 1 for name in row}
    for name in {str(n) for n in range(31)} - several:
        assert groups.of(ImageRef(uri=name)) == number_of(ImageRef(uri=name))


@given(st.lists(st.text(max_size=3), min_size=2, max_size=5))
def test_a_row_that_shares_no_image_goes_by_its_first_one(names: list[str]) -> None:
    groups = Groups([refs(tuple(names))])
    assert {groups.of(image) for image in refs(tuple(names))} == {number_of(refs((names[0],))[0])}


def test_large_groups_are_not_drawn_to_the_first_split() -> None:
    """As the least of many numbers would be."""
    rows = [(f"{group}-{i}", f"{group}-{i + 1}") for group in range(500) for i in range(20)]
    groups = groups_of(rows)
    found = Counter(split_of(groups, f"{group}-0") for group in range(500))
    assert 180 < found["train"] < 320
    assert 90 < found["val"] < 210


CHAIN = [("a", "b"), ("b", "c"), ("c", "d"), ("d",), ("e", "f"), ("g",), ("h",), ("i",), ("k",)]
"""Rows of images; the first four hang together."""


def exported(place: Path, images: list[Any], *options: str) -> tuple[dict[str, Any], list[Any]]:
    """What a run over these rows becomes; the lines of each split. Parts of two rows, so that the
    chain goes through several."""
    columns = {"image": images, "reply": [f"text {i}" for i in range(len(images))]}
    manifest = write_manifest(place / "m.parquet", columns)
    run = vlmbatch(
        *("run", manifest, *echo(reply_from="reply"), "-o", place / "out"),
        *("--part-rows=2", "--max-failure-rate=1"),
    )
    assert run.exit_code == 0, run
    split = ("--split", "train=0.4,val=0.3,test=0.3", "--json")
    done = vlmbatch("export", place / "out", place / "a", "--to", "jsonl", *split, *options)
    assert done.exit_code == 0, done
    lines = []
    for name in ("train", "val", "test"):
        path = place / f"a/{name}.jsonl"
        found = path.read_text().splitlines() if path.exists() else []
        lines.append([json.loads(line) for line in found])
    return done.json, lines


@pytest.mark.parametrize("mode", ["named", "copied", "inline"])
def test_rows_that_share_an_image_through_others_are_in_one_split(
    mode: str, tmp_path: Path
) -> None:
    """Also where one of them has failed or is left out: exports of one run split alike."""
    colours = {name: f"#{ord(name):02x}{i:02x}7f" for i, name in enumerate("abcdefghik")}
    (tmp_path / "photos").mkdir()
    for name, colour in colours.items():
        (tmp_path / f"photos/{name}.png").write_bytes(picture(colour=colour))
    named = [[f"photos/{name}.png" for name in row] for row in CHAIN]
    inline = [[(tmp_path / path).read_bytes() for path in row] for row in named]
    images = inline if mode == "inline" else named
    options = () if mode == "named" else ("--images", "copy")
    summary, splits = exported(tmp_path, images, *options, "--where", "row <> 1")
    assert summary["dropped"] == {"where": 1}
    chained = [
        name for name, lines in enumerate(splits) if any(x["row"] in (0, 2, 3) for x in lines)
    ]
    assert len(chained) == 1
    pixels = [
        {(tmp_path / "a" / path).read_bytes() for line in lines for path in line["images"]}
        for lines in splits
    ]
    assert sum(map(len, pixels)) == len(set().union(*pixels)) == len(colours)


def test_a_split_far_from_what_was_asked_for_is_told_with_the_reason(tmp_path: Path) -> None:
    """A picture that stands beside all others leaves nothing to divide."""
    for name in ("logo", "a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(picture())
    images = [[f"{name}.png", "logo.png"] for name in "abc"]
    summary, splits = exported(tmp_path, images)
    assert sorted(map(len, splits)) == [0, 0, 3]
    assert len(summary["warnings"]) == 2
    assert all("rows that share an image" in each for each in summary["warnings"])
