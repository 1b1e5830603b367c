"""A stand-in with CogVLM's entry points: build_conversation_input_ids, generate."""

import torch
from transformers import PretrainedConfig

from .pixels import Speaks, tensor_of, wanted

VISION = 1


class CogVLMConfig(PretrainedConfig):
    model_type = "cogvlm"

    def __init__(self, vision_config=None, vocab_size=300, template_version="chat", **kwargs):
        self.vision_config = vision_config or {"image_size": 490, "patch_size": 14}
        self.template_version = template_version
        self.vocab_size = vocab_size
        self.num_hidden_layers = 1
        super().__init__(**kwargs)


class CogVLMForCausalLM(Speaks):
    config_class = CogVLMConfig

    def build_conversation_input_ids(
        self, tokenizer, *, query, history=None, images=None, template_version=None
    ):
        assert images is None or len(images) <= 1, "not support multi images by now."
        version = template_version or self.config.template_version
        text = query if version == "base" else f"Question: {query} Answer:"
        ids, types = [tokenizer.bos_token_id], [0]
        if images:
            side = self.config.vision_config["image_size"]
            images = [tensor_of(images[0].resize((side, side), 0))]
            ids += [tokenizer.pad_token_id] * 4
            types += [VISION] * 4
        text_ids = tokenizer.encode(text, add_special_tokens=False)
        ids += text_ids
        types += [0] * len(text_ids)
        return {
            "input_ids": torch.tensor(ids),
            "token_type_ids": torch.tensor(types),
            "attention_mask": torch.ones(len(ids), dtype=torch.long),
            "images": images,
        }

    def forward(
        self, input_ids=None, images=None, token_type_ids=None, attention_mask=None, **kwargs
    ):
        return super().forward(input_ids, **kwargs)

    def plan(self, ids, images=None, token_type_ids=None, **kwargs):
        ((pixels,),) = images
        assert token_type_ids[0].sum() == 4
        prompt = bytes(i for i in ids if i < 256).decode()
        phrase = wanted(prompt, "Where is ", "? answer in [[x0,y0,x1,y1]] format.")
        labels = wanted(prompt, "Can you point out every ", " in the image")
        if phrase is None and labels is None:
            return self.eye.says(prompt, pixels).encode()
        said = []
        for label in (phrase or labels).split(", "):
            box = self.eye.box(pixels, label)
            if box is not None:
                numbers = ",".join(f"{min(round(edge * 1000), 999):03}" for edge in box)
                said.append(f"{label} [[{numbers}]]")
        return (", ".join(said) or "There are none.").encode()
