"""A stand-in with Moondream's entry points; like the real one it does not call post_init().

Each call of encode_image adds a line to the file that ENCODES_LOG names.
"""

import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .pixels import Eye, checksum, count, tensor_of


class HfConfig(PretrainedConfig):
    model_type = "moondream1"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.config = {}


@dataclass(frozen=True)
class EncodedImage:
    pixels: torch.Tensor


class Tokenizer:
    def encode(self, text):
        return type("Encoding", (), {"ids": text.split()})


class MoondreamModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.eye = Eye()
        self.tokenizer = Tokenizer()

    def encode_image(self, image, settings=None):
        if isinstance(image, EncodedImage):
            return image
        pixels = tensor_of(image)
        count(os.environ.get("ENCODES_LOG"), str(checksum(pixels)))
        self.eye.nearest(pixels)
        return EncodedImage(pixels)

    def caption(self, image, length="normal", stream=False, settings=None):
        said = self.eye.says("", self.encode_image(image).pixels)
        return {"caption": self._cut(said if length == "short" else said + ", at length", settings)}

    def query(self, image=None, question=None, stream=False, settings=None):
        return {
            "answer": self._cut(self.eye.says(question, self.encode_image(image).pixels), settings)
        }

    def detect(self, image, object, settings=None):
        box = self.eye.box(self.encode_image(image).pixels, object)
        edges = ("x_min", "y_min", "x_max", "y_max")
        return {"objects": [] if box is None else [dict(zip(edges, box, strict=True))]}

    def point(self, image, object, settings=None):
        box = self.eye.box(self.encode_image(image).pixels, object)
        if box is None:
            return {"points": []}
        return {"points": [{"x": (box[0] + box[2]) / 2, "y": (box[1] + box[3]) / 2}]}

    def _cut(self, text, settings):
        assert settings["temperature"] == 0
        return " ".join(text.split()[: settings["max_tokens"]])


class HfMoondream(PreTrainedModel):
    config_class = HfConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MoondreamModel()

    @property
    def encode_image(self):
        return self.model.encode_image

    @property
    def query(self):
        return self.model.query

    @property
    def caption(self):
        return self.model.caption

    @property
    def detect(self):
        return self.model.detect

    @property
    def point(self):
        return self.model.point
