"""Hugging Face `datasets`: an ImageFolder, whose metadata has ``objects`` as lists of one length.

A box is ``[x, y, width, height]`` in pixels. Source: huggingface.co/docs/datasets/image_dataset.
The metadata is Parquet: of JSON lines, a split without any box would have other types.
"""

from __future__ import annotations

from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

from vlmbatch.exports.annotations import Annotations, Labelled
from vlmbatch.exports.base import SPLITS_OF_DATASETS, Example, ImageMode
from vlmbatch.exports.boxes import xywh
from vlmbatch.exports.carried import type_in_json, value_from_json
from vlmbatch.exports.imagefolder import IN_FOLDERS, allowed_in_folders
from vlmbatch.exports.sinks import ParquetSink

_OBJECTS = pa.struct(
    [
        pa.field("bbox", pa.list_(pa.list_(pa.float32()))),
        pa.field("categories", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float32())),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("file_name", pa.string()),
        pa.field("id", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("objects", _OBJECTS),
    ]
)


class HfObjects(Annotations):
    """``categories`` are names, ``scores`` null where the model gave none."""

    name = "hf-objects"
    about = "boxes: SPLIT/metadata.parquet beside images, for load_dataset('imagefolder')"
    images = (ImageMode.COPY,)
    split_names = SPLITS_OF_DATASETS
    taken = frozenset((*SCHEMA.names, *IN_FOLDERS))

    def allowed(self, name: str) -> str:
        return allowed_in_folders(name)

    def copy_to(self, example: Example, name: str) -> str:
        return f"{example.split}/{example.row // 10_000:05d}/{name}"

    def finish(self) -> None:
        for split in self.found:
            self.export.destination.write(f"{split}/metadata.parquet", partial(self._write, split))

    def _write(self, split: str, file: BinaryIO) -> None:
        columns = {name: each.type for name, each in self.columns.items()}
        fields = [pa.field(name, type_in_json(kind)) for name, kind in columns.items()]
        sink = ParquetSink(file, pa.schema([*SCHEMA, *fields]))
        for image in self.labelled(split):
            carried = {
                name: value_from_json(image.carried[name], kind) for name, kind in columns.items()
            }
            sink.add({**row_of(image), **carried})
        sink.close()


def row_of(image: Labelled) -> dict[str, Any]:
    return {
        "file_name": str(PurePosixPath(*PurePosixPath(image.path).parts[1:])),
        "id": image.id,
        "width": image.size.width,
        "height": image.size.height,
        "objects": {
            "bbox": [xywh(box) for box in image.boxes],
            "categories": [box.label for box in image.boxes],
            "scores": [box.score for box in image.boxes],
        },
    }


FORMAT = HfObjects
