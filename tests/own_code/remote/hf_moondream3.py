"""A stand-in with what Moondream 3 does otherwise: it loads its weights itself, and ``caption`` of
the outer class gives the text."""

import os

from safetensors.torch import load_file

from .hf_moondream import HfConfig as Moondream2Config
from .hf_moondream import HfMoondream as Moondream2


class HfConfig(Moondream2Config):
    model_type = "moondream3"


class HfMoondream(Moondream2):
    config_class = HfConfig

    @classmethod
    def from_pretrained(cls, path, *args, revision=None, **kwargs):
        model = cls(kwargs.pop("config", None) or HfConfig())
        model.load_state_dict(load_file(os.path.join(path, "model.safetensors")))
        return model

    def caption(self, images, tokenizer=None, length=None, **kwargs):
        return self.model.caption(images, length=length, **kwargs)["caption"]

    def encode_image(self, images, **kwargs):
        return self.model.encode_image(images, **kwargs)
