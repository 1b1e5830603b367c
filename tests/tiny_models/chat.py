"""Checkpoints with a chat template: LLaVA, DeepSeek-VL, Gemma 3, Aya Vision, Llama 3.2 Vision."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_models.base import save, small, small_vision, talking_tokenizer, template

SIDE, PATCH = 32, 8
SQUARE = {"height": SIDE, "width": SIDE}
VICUNA = template("USER: ", "<image>\n", " ", "ASSISTANT:")
MISTRAL = template("[INST] ", "<image>\n", " ", "[/INST]")
DEEPSEEK = template(
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language.\n\nUser: ",
    "<image_placeholder>",
    "\n\n",
    "Assistant:",
)
GEMMA = template(
    "<bos><start_of_turn>user\n",
    "<start_of_image>",
    "<end_of_turn>\n",
    "<start_of_turn>model\n",
)
AYA = template(
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
    "<image>",
    "<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)
LLAMA = template(
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
    "<|image|>",
    "<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)


def build_llava(folder: Path, seed: int = 0, *, chat_template: str | None = VICUNA) -> Path:
    """A LLaVA 1.5 of 0.1 million random weights: one image of 16 tokens."""
    import torch
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = talking_tokenizer(("<pad>", "<s>", "</s>", "<image>"))
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **small_vision(SIDE, PATCH)},
        text_config=LlamaConfig(**small(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    torch.manual_seed(seed)
    return save(folder, LlavaForConditionalGeneration(config), processor)


def build_llava_next(folder: Path, seed: int = 0, *, mistral: bool = False) -> Path:
    """A LLaVA 1.6 of 0.1 million random weights: tiles of 16 tokens."""
    import torch
    from transformers import (
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        MistralConfig,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    tokenizer = talking_tokenizer(("<pad>", "<s>", "</s>", "<image>"))
    pinpoints = [
        [SIDE * rows, SIDE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    ]
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL if mistral else VICUNA,
    )
    text = small(tokenizer)
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **small_vision(SIDE, PATCH)},
        text_config=MistralConfig(**text) if mistral else LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    torch.manual_seed(seed)
    return save(folder, LlavaNextForConditionalGeneration(config), processor)


def build_deepseek_vl(folder: Path, seed: int = 0) -> Path:
    """A DeepSeek-VL of 0.1 million random weights: one image of 16 tokens."""
    import torch
    from transformers import (
        DeepseekVLConfig,
        DeepseekVLForConditionalGeneration,
        DeepseekVLProcessor,
        LlamaConfig,
    )
    from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
        DeepseekVLImageProcessorPil,
    )

    tokenizer = _deepseek_tokenizer()
    processor = DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size=SQUARE, min_size=4),
        tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
        chat_template=DEEPSEEK,
    )
    config = DeepseekVLConfig(
        text_config=LlamaConfig(**small(tokenizer)),
        vision_config=small_vision(SIDE, PATCH),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    torch.manual_seed(seed)
    return save(folder, DeepseekVLForConditionalGeneration(config), processor)


def build_deepseek_vl_hybrid(folder: Path, seed: int = 0) -> Path:
    """A DeepSeek-VL of 0.1 million random weights with a second encoder, for 64 px."""
    import torch
    from transformers import (
        DeepseekVLHybridConfig,
        DeepseekVLHybridForConditionalGeneration,
        DeepseekVLHybridProcessor,
        LlamaConfig,
    )
    from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
        DeepseekVLHybridImageProcessorPil,
    )

    tokenizer = _deepseek_tokenizer()
    processor = DeepseekVLHybridProcessor(
        DeepseekVLHybridImageProcessorPil(
            size=SQUARE,
            min_size=4,
            high_res_size={"height": 2 * SIDE, "width": 2 * SIDE},
        ),
        tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
        chat_template=DEEPSEEK,
    )
    config = DeepseekVLHybridConfig(
        text_config=LlamaConfig(**small(tokenizer)),
        vision_config=small_vision(SIDE, PATCH),
        high_res_vision_config=small_vision(
            2 * SIDE,
            PATCH,
            output_channels=8,
            window_size=4,
            mlp_dim=64,
            global_attn_indexes=[1],
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    torch.manual_seed(seed)
    return save(folder, DeepseekVLHybridForConditionalGeneration(config), processor)


def _deepseek_tokenizer():
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    return talking_tokenizer(
        ("<pad>", bos, eos, "<image_placeholder>"),
        extra_special_tokens={"image_token": "<image_placeholder>"},
    )


def build_gemma3(folder: Path, seed: int = 0) -> Path:
    """A Gemma 3 of 0.1 million random weights: one image of 4 tokens."""
    import torch
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3Processor,
        Gemma3TextConfig,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    turns = ("<start_of_turn>", "<end_of_turn>")
    images = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    tokenizer = talking_tokenizer(
        ("<pad>", "<bos>", "<eos>", *turns, *images),
        extra_special_tokens=dict(
            zip(("boi_token", "eoi_token", "image_token"), images, strict=True)
        ),
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE),
        tokenizer,
        image_seq_length=4,
        chat_template=GEMMA,
    )
    boi, eoi, image = tokenizer.convert_tokens_to_ids(images)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**small(tokenizer, head_dim=16, query_pre_attn_scalar=16)),
        vision_config=small_vision(SIDE, PATCH, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=image,
    )
    torch.manual_seed(seed)
    return save(folder, Gemma3ForConditionalGeneration(config), processor)


def build_aya_vision(folder: Path, seed: int = 0) -> Path:
    """An Aya Vision of 0.1 million random weights: up to 12 tiles of 4 tokens."""
    import torch
    from transformers import (
        AyaVisionConfig,
        AyaVisionForConditionalGeneration,
        AyaVisionProcessor,
        Cohere2Config,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    turns = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
    tiles = ("TILE_GLOBAL", *(f"TILE_{number}" for number in range(12, 0, -1)))
    images = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", *tiles)
    tokenizer = talking_tokenizer(
        ("<PAD>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", *turns, *images)
    )
    processor = AyaVisionProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=12),
        tokenizer,
        patch_size=PATCH,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=AYA,
    )
    config = AyaVisionConfig(
        text_config=Cohere2Config(**small(tokenizer, head_dim=16)),
        vision_config=small_vision(SIDE, PATCH, vision_use_head=False),
        downsample_factor=2,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    torch.manual_seed(seed)
    return save(folder, AyaVisionForConditionalGeneration(config), processor)


def build_mllama(folder: Path, seed: int = 0) -> Path:
    """A Llama 3.2 Vision of 0.1 million random weights: up to four tiles of 32 px."""
    import torch
    from transformers import (
        MllamaConfig,
        MllamaForConditionalGeneration,
        MllamaProcessor,
    )
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    turns = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
    specials = ("<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|eot_id|>", *turns)
    tokenizer = talking_tokenizer((*specials, "<|image|>"))
    processor = MllamaProcessor(
        MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4), tokenizer, chat_template=LLAMA
    )
    config = MllamaConfig(
        text_config=small(tokenizer, num_hidden_layers=3, cross_attention_layers=[1]),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 48,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    torch.manual_seed(seed)
    return save(folder, MllamaForConditionalGeneration(config), processor)
