"""A stand-in with Phi-3.5-vision's entry points: the processor's call, generate."""

import re

import torch
from transformers import BatchFeature, PretrainedConfig, ProcessorMixin

from .pixels import Speaks, tensor_of


class Phi3VConfig(PretrainedConfig):
    model_type = "phi3_v"

    def __init__(self, vocab_size=300, **kwargs):
        self.vocab_size = vocab_size
        self.num_hidden_layers = 1
        super().__init__(**kwargs)


class Phi3VProcessor(ProcessorMixin):
    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)

    def __call__(self, text, images=None, return_tensors="pt"):
        marks = re.findall(r"<\|image_(\d+)\|>", text)
        assert marks == [str(n + 1) for n in range(len(images))], marks
        ids = self.tokenizer.encode(re.sub(r"<\|image_\d+\|>", "", text), add_special_tokens=False)
        pixels = torch.stack([tensor_of(image) for image in images])
        made = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "pixel_values": pixels}
        return BatchFeature(made, tensor_type=return_tensors)


class Phi3VForCausalLM(Speaks):
    config_class = Phi3VConfig

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **kwargs):
        return super().forward(input_ids, **kwargs)

    def plan(self, ids, pixel_values=None, **kwargs):
        assert ids[-1] != self.config.eos_token_id
        prompt = bytes(i for i in ids if i < 256).decode()
        system = "Yes, " if "Say yes first." in prompt else ""
        return (system + self.eye.says(prompt, pixel_values[0])).encode()
