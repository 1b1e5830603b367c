"""An Idefics3, as SmolVLM is one."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_models.base import CONTEXT, byte_tokenizer, talking_tokenizer

IMAGE_SIDE, PATCH = 64, 8
SPECIALS = (
    "<pad>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
)
# As SmolVLM words it (transformers: models/smolvlm/processing_smolvlm.py).
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] != 'image' %} {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def build_idefics3(
    folder: Path,
    seed: int = 0,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    side: int = IMAGE_SIDE,
    split: bool = False,
) -> Path:
    """An Idefics3 of 0.1 million random weights that AutoProcessor and AutoModel load.

    One image is 16 tokens, the context ``CONTEXT`` tokens, a token about one byte of text. With
    ``split``, a larger image is several tiles of ``side`` pixels, as published ones have it. Its
    generation_config.json asks for sampling, as many of them do.
    """
    import torch
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
        LlamaConfig,
    )
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    specials = [*SPECIALS, *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))]
    tokenizer = (
        talking_tokenizer(specials, additional_special_tokens=specials[3:])
        if split
        else byte_tokenizer(SPECIALS, additional_special_tokens=list(SPECIALS[3:]))
    )
    images = Idefics3ImageProcessorPil(
        do_image_splitting=split,
        size={"longest_edge": 4 * side if split else side},
        max_image_size={"longest_edge": side},
    )
    processor = Idefics3Processor(
        images,
        tokenizer,
        image_seq_len=(side // PATCH // 2) ** 2,
        chat_template=chat_template,
    )
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": PATCH,
            "initializer_range": 0.2,
        },
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
