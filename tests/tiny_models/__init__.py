"""Checkpoints with random weights, built from config classes: real architectures, no downloads."""

from tests.tiny_models.base import CONTEXT, byte_tokenizer
from tests.tiny_models.chat import (
    build_aya_vision,
    build_deepseek_vl,
    build_deepseek_vl_hybrid,
    build_gemma3,
    build_llava,
    build_llava_next,
    build_mllama,
)
from tests.tiny_models.idefics3 import CHAT_TEMPLATE, IMAGE_SIDE, PATCH, SPECIALS, build_idefics3
from tests.tiny_models.raw import build_florence2, build_fuyu, build_kosmos2, build_paligemma

__all__ = [
    "CHAT_TEMPLATE",
    "CONTEXT",
    "IMAGE_SIDE",
    "PATCH",
    "SPECIALS",
    "build_aya_vision",
    "build_deepseek_vl",
    "build_deepseek_vl_hybrid",
    "build_florence2",
    "build_fuyu",
    "build_gemma3",
    "build_idefics3",
    "build_kosmos2",
    "build_llava",
    "build_llava_next",
    "build_mllama",
    "build_paligemma",
    "byte_tokenizer",
]
