"""A stand-in with Molmo's entry points: processor.process, generate_from_batch."""

import numpy as np
import torch
from transformers import PretrainedConfig, ProcessorMixin

from .pixels import Speaks, tensor_of, wanted


class MolmoConfig(PretrainedConfig):
    model_type = "molmo"

    def __init__(self, vocab_size=300, **kwargs):
        self.vocab_size = vocab_size
        self.num_hidden_layers = 1
        super().__init__(**kwargs)


class MolmoProcessor(ProcessorMixin):
    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)

    def process(self, text=None, images=None, message_format="role", always_start_with_space=True):
        """No batch dimension."""
        if message_format == "role":
            text = "User: " + text + " Assistant:"
        if always_start_with_space:
            text = " " + text
        assert text.count("User: ") == 1, "framed twice"
        ids = [256, *self.tokenizer.encode(text, add_special_tokens=False)]
        pixels = np.stack([tensor_of(image).numpy() for image in images])
        return {"input_ids": torch.tensor(ids), "images": torch.from_numpy(pixels)}


class MolmoForCausalLM(Speaks):
    config_class = MolmoConfig

    @torch.no_grad()
    def generate_from_batch(self, batch, generation_config=None, **kwargs):
        assert generation_config.use_cache
        assert generation_config.max_new_tokens is not None
        ids = batch["input_ids"]
        mask = torch.ones_like(ids)
        return super().generate(
            ids, generation_config, attention_mask=mask, images=batch.get("images"), **kwargs
        )

    def forward(self, input_ids=None, images=None, attention_mask=None, **kwargs):
        return super().forward(input_ids, **kwargs)

    def plan(self, ids, images=None, **kwargs):
        pixels = images[0, 0]
        prompt = bytes(i for i in ids if i < 256).decode()
        assert prompt.startswith(" User: ")
        assert prompt.endswith(" Assistant:")
        what = wanted(prompt, "Point to the ", ".")
        if what is None:
            return self.eye.says(prompt, pixels).encode()
        said = []
        for label in what.split(", "):
            box = self.eye.box(pixels, label)
            if box is not None:
                x, y = (box[0] + box[2]) * 50, (box[1] + box[3]) * 50
                said.append(f'<point x="{x:.1f}" y="{y:.1f}" alt="{label}">{label}</point>')
        return (" ".join(said) or "There are none.").encode()
