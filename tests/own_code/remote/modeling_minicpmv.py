"""A stand-in with MiniCPM-V's entry point: chat, which generates from embeddings."""

from copy import deepcopy

import torch
from PIL import Image
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from .pixels import Speaks, tensor_of, wanted


class MiniCPMVConfig(PretrainedConfig):
    model_type = "minicpmv"

    def __init__(self, vocab_size=300, **kwargs):
        self.vocab_size = vocab_size
        self.num_hidden_layers = 1
        super().__init__(**kwargs)


class MiniCPMVProcessor(ProcessorMixin):
    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)

    def __call__(self, text, images, max_length):
        ids = self.tokenizer.encode(text, add_special_tokens=False)[:max_length]
        return {"input_ids": torch.tensor([ids]), "images": [tensor_of(i) for i in images]}


class Llm(Speaks):
    """Generates from embeddings, so what it returns begins with the answer."""

    config_class = MiniCPMVConfig

    def generate(self, inputs_embeds=None, prompt=None, pixels=None, **kwargs):
        self._start = 0
        self._plan = [*self._answer(prompt, pixels).encode(), self.config.eos_token_id]
        return super(Speaks, self).generate(inputs_embeds=inputs_embeds, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        at = input_ids.shape[1]
        ids = input_ids if at else torch.zeros(1, 1, dtype=torch.long)
        self._start = ids.shape[1] - at
        return super().forward(ids, **kwargs)

    def _answer(self, prompt, pixels):
        labels = []
        while (label := wanted(prompt, "<ref>", "</ref>")) is not None:
            labels.append(label)
            prompt = prompt.partition("</ref>")[2]
        if not labels:
            system = "Yes, " if prompt.startswith("Say yes first.") else ""
            return system + self.eye.says(prompt, pixels)
        said = ""
        for label in labels:
            box = self.eye.box(pixels, label)
            if box is not None:
                edges = " ".join(str(min(round(edge * 1000), 1000)) for edge in box)
                said += f"<ref>{label}</ref><box>{edges}</box>"
        return said or "There are none."


class MiniCPMV(PreTrainedModel):
    config_class = MiniCPMVConfig

    def __init__(self, config):
        super().__init__(config)
        self.llm = Llm(config)
        self.marks = nn.Parameter(torch.zeros(2))
        self.post_init()

    def _init_weights(self, module):
        pass

    def chat(
        self,
        image,
        msgs,
        tokenizer,
        processor=None,
        vision_hidden_states=None,
        max_new_tokens=1024,
        sampling=True,
        max_inp_length=2048,
        system_prompt="",
        stream=False,
        **kwargs,
    ):
        assert processor is not None, "it would be loaded without the revision"
        copy_msgs = deepcopy(msgs)
        if image is not None and isinstance(copy_msgs[0]["content"], str):
            copy_msgs[0]["content"] = [image, copy_msgs[0]["content"]]
        content = copy_msgs[0]["content"]
        images = [each for each in content if isinstance(each, Image.Image)]
        parts = ["(<image>./</image>)" if each in images else each for each in content]
        prompt = system_prompt + "\n".join(parts)
        made = processor(prompt, images, max_length=max_inp_length)
        how = {"num_beams": 3, "repetition_penalty": 1.2}
        if sampling:
            how = {"top_p": 0.8, "top_k": 100, "temperature": 0.7, "do_sample": True}
        how.update((key, kwargs[key]) for key in how.keys() & kwargs.keys())
        result = self.llm.generate(
            inputs_embeds=torch.zeros(1, made["input_ids"].shape[1], 4),
            prompt=prompt,
            pixels=made["images"][0],
            pad_token_id=0,
            eos_token_id=[tokenizer.eos_token_id],
            max_new_tokens=max_new_tokens,
            **how,
        )
        return tokenizer.decode([i for i in result[0].tolist() if i < 256]).strip()
