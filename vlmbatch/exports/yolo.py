"""YOLO, as ultralytics trains on it: ``labels/SPLIT/NAME.txt`` beside ``images/SPLIT/NAME.jpg``.

A line is ``class xc yc width height``, 0 to 1; a sixth number, such as a score, is refused. Source:
docs.ultralytics.com/datasets/detect and ultralytics 8.4, data/utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from vlmbatch.exports.boxes import shares
from vlmbatch.grounding import Box, Size


def line(category: int, box: Box, image: Size) -> str:
    """``category`` counts from 0."""
    x, y, width, height = shares(box, image)
    numbers = (x + width / 2, y + height / 2, width, height)
    return " ".join([str(category), *(f"{number:.8f}" for number in numbers)])


def data_yaml(categories: Sequence[str], folders: Mapping[str, str]) -> str:
    """``folders``: of the images of each split, relative to the file.

    It has no ``path``: ultralytics takes a relative one for a folder below its own settings' folder
    of data sets, and the file's own folder where there is none.
    """
    known = {"train": "train", "val": "val", "validation": "val", "test": "test"}
    paths = {known[split]: folder for split, folder in folders.items() if split in known}
    some = next(iter(folders.values()), "images")
    paths = {"train": some, "val": paths.get("train", some), **paths}  # both are required
    names = dict(enumerate(categories))
    return yaml.safe_dump({**paths, "names": names}, allow_unicode=True, sort_keys=False)
