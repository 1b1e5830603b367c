"""A checkpoint's own code as published ones have it: written for transformers 4, it cannot be
imported under 5. Whatever it is shown, it answers which versions it runs with, and where."""

import sys

import huggingface_hub
import tokenizers
import torch
import transformers
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.pytorch_utils import find_pruneable_heads_and_indices  # noqa: F401

PAD, EOS = 0, 3


class NeedsOlderConfig(PretrainedConfig):
    model_type = "needs_older"


class Bytes:
    """A token is a byte of the text."""

    pad_token, bos_token, eos_token = "\0", None, "\3"
    pad_token_id, eos_token_id = PAD, EOS
    chat_template = None
    padding_side = "left"

    def get_vocab(self):
        return {chr(byte): byte for byte in range(256)}

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


class NeedsOlderProcessor(ProcessorMixin):
    chat_template = None
    image_processor = "none"

    def __init__(self):
        self.tokenizer = Bytes()

    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()

    def __call__(self, text, images, **_):
        rows = [list(prompt.encode()) for prompt in text]
        longest = max(map(len, rows))
        padded = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
        return {"input_ids": padded, "attention_mask": (padded != PAD).long()}


class NeedsOlderForCaptions(PreTrainedModel):
    config_class = NeedsOlderConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig(eos_token_id=EOS)
        self.post_init()

    def generate(self, input_ids, **_):
        versions = [
            f"{library.__name__} {library.__version__}"
            for library in (transformers, huggingface_hub, tokenizers, torch)
        ]
        said = f"{', '.join(versions)} in {sys.prefix}, {float(self.weight)}"
        answer = torch.tensor([[*said.encode(), EOS]] * len(input_ids))
        return torch.cat([input_ids, answer], dim=1)
