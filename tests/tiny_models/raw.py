"""Checkpoints that are asked in raw prompts: KOSMOS-2, Fuyu, PaliGemma, Florence-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_models.base import (
    CONTEXT,
    LONGER,
    byte_tokenizer,
    save,
    small,
    small_vision,
    spoken,
    talking_tokenizer,
)
from vlmbatch.families import entry_named
from vlmbatch.records import IMAGE, TaskKind
from vlmbatch.tasks import Ask


def build_kosmos2(folder: Path, seed: int = 0) -> Path:
    """A Kosmos-2 of 0.1 million random weights: no chat template, one image of 64 tokens."""
    import torch
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": 32, "width": 32}
    tokenizer = byte_tokenizer(("<pad>", "<s>", "</s>", "<unk>"), unk_token="<unk>")
    images = CLIPImageProcessorPil(size=square, crop_size=square)
    processor = Kosmos2Processor(images, tokenizer, num_patch_index_tokens=1024)
    config = Kosmos2Config(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "embed_dim": 32,
            "layers": 2,
            "ffn_dim": 64,
            "attention_heads": 2,
            "max_position_embeddings": CONTEXT,
            "init_std": 0.2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        latent_query_num=64,
    )
    torch.manual_seed(seed)
    Kosmos2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_fuyu(folder: Path, seed: int = 0) -> Path:
    """A Fuyu of 0.2 million random weights: patches of 30 px, each one token."""
    import torch
    from transformers import FuyuConfig, FuyuForCausalLM, FuyuProcessor
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    tokenizer = _fuyu_tokenizer()
    processor = FuyuProcessor(FuyuImageProcessorPil(), tokenizer)
    numbers = small(tokenizer)
    del numbers["num_key_value_heads"]
    image_token_id = tokenizer.convert_tokens_to_ids("|SPEAKER|")
    torch.manual_seed(seed)
    config = FuyuConfig(**numbers, image_token_id=image_token_id)
    return save(folder, FuyuForCausalLM(config), processor)


def _fuyu_tokenizer() -> Any:
    """Pieces as SentencePiece has them; its special tokens are pieces like the others."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({*"".join(spoken()), *"abcdefghijklmnopqrstuvwxyz"} - {*" \n0123456789"})
    specials = ["<unk>", "<s>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    family = entry_named("fuyu").make({})
    asked = family.word(Ask(TaskKind.GROUND, question="a red cup")) + family.word(
        Ask(TaskKind.CAPTION)
    )
    pieces += sorted({f"▁{word}" for word in asked.strip(IMAGE).split()})
    pieces += [str(number) for number in range(1000)]
    unigram = Tokenizer(
        models.Unigram(
            [(piece, 0.0 if at < 10 else -2.0) for at, piece in enumerate(pieces)],
            unk_id=0,
            byte_fallback=True,
        )
    )
    unigram.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    unigram.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=unigram,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="|ENDOFTEXT|",
        pad_token="<unk>",
    )


def build_paligemma(folder: Path, seed: int = 0) -> Path:
    """A PaliGemma of 0.1 million random weights: one image of 16 tokens."""
    import torch
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    side, patch = 32, 8
    images = SiglipImageProcessorPil(size={"height": side, "width": side})
    images.image_seq_length = (side // patch) ** 2
    tokenizer = talking_tokenizer(
        ("<pad>", "<bos>", "<eos>", "<image>"), extra_special_tokens={"image_token": "<image>"}
    )
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**small(tokenizer, head_dim=16)),
        vision_config=small_vision(side, patch, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        vocab_size=len(tokenizer),
    )
    torch.manual_seed(seed)
    return save(folder, PaliGemmaForConditionalGeneration(config), processor)


def build_florence2(folder: Path, seed: int = 0) -> Path:
    """A Florence-2 of 0.2 million random weights: one image of 5 tokens."""
    import torch
    from transformers import (
        BartConfig,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = 64
    square = {"height": side, "width": side}
    images = CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)
    images.image_seq_length = (side // 32) ** 2 + 1
    locations = [f"<loc_{i}>" for i in range(1000)]
    specials = ("<pad>", "<s>", "</s>", "<image>", *locations)
    tokenizer = talking_tokenizer(specials, extra_special_tokens={"image_token": "<image>"})
    tasks = ("ocr", "phrase_grounding", "description_with_bboxes", "pure_text")
    processor = Florence2Processor(
        images, tokenizer, post_processor_config={task: {} for task in tasks}
    )
    config = Florence2Config(
        text_config=BartConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=LONGER,
            dropout=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=tokenizer.eos_token_id,
            forced_eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config={
            "depths": (1, 1, 1, 1),
            "embed_dim": (8, 8, 16, 32),
            "num_heads": (1, 1, 2, 2),
            "num_groups": (1, 1, 2, 2),
            "window_size": 2,
            "projection_dim": 32,
            "drop_path_rate": 0.0,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    return save(folder, Florence2ForConditionalGeneration(config), processor)
