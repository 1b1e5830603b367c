"""The demo model in parts: tokenizer, processor and an untrained network, of SmolVLM's kinds."""

import copy
import json
from pathlib import Path

import torch
from shapes import GRID, sentences
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

SPECIALS = (
    "<pad>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
)
WIDTH, HEAD = 192, 64
PATCH, MERGE = 8, 1
IMAGE_TOKENS = (GRID // PATCH // MERGE) ** 2

CHAT_TEMPLATE = """\
<|im_start|>
{%- for message in messages -%}
{{ message['role'] | capitalize }}:
{%- if message['content'] is string %} {{ message['content'] }}
{%- else %}
{%- if message['content'] and message['content'][0]['type'] != 'image' %} {% endif %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}<image>
{%- elif part['type'] == 'text' %}{{ part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}<end_of_utterance>
{% endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: each word of the corpus and each of <loc_0>..<loc_64> is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = {text: None for text in sentences() if "<loc_" not in text}
    bpe.train_from_iterator(words, trainer)
    bpe.add_tokens(
        [AddedToken(f"<loc_{edge}>", special=False, normalized=False) for edge in range(GRID + 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<end_of_utterance>",
        bos_token="<|im_start|>",
        additional_special_tokens=list(SPECIALS[3:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_processor() -> Idefics3Processor:
    """Squashes the whole picture to 64x64 px, no padding; do_resize off skips the aspect-kept step.

    With splitting off the image processor ends by resizing both sides to max_image_size.
    """
    images = Idefics3ImageProcessorPil(
        do_resize=False,
        do_image_splitting=False,
        size={"longest_edge": GRID},
        max_image_size={"longest_edge": GRID},
        resample=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Idefics3Processor(
        images, make_tokenizer(), image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE
    )


def make_model(
    processor: Idefics3Processor, vision_layers: int = 6, text_layers: int = 4
) -> Idefics3ForConditionalGeneration:
    """An untrained network for the processor's tokens, about 4.8 million parameters."""
    words = processor.tokenizer
    config = Idefics3Config(
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        scale_factor=MERGE,
        tie_word_embeddings=False,
        vlmbatch_family="demo",  # how vlmbatch asks and reads it; models fine-tuned from it keep it
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": WIDTH // HEAD,
            "image_size": GRID,
            "patch_size": PATCH,
            "initializer_range": 0.04,
        },
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=512,
            num_hidden_layers=text_layers,
            num_attention_heads=WIDTH // HEAD,
            num_key_value_heads=WIDTH // HEAD,
            head_dim=HEAD,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            initializer_range=0.04,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            tie_word_embeddings=False,
        ),
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.bos_token_id = words.bos_token_id
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model


def seed_vision(model: Idefics3ForConditionalGeneration) -> None:
    """Start the vision tower where small ones learn fast: local attention, whitened patches.

    Source of the attention's start: "Mimetic Initialization of Self-Attention Layers", Trockman and
    Kolter 2023 (W_q W_k^T near 0.7 I, W_v W_o near -0.4 I, both with noise).
    """
    eyes = model.model.vision_model
    eyes.embeddings.position_embedding.weight.data = _waves(GRID // PATCH)
    eyes.embeddings.patch_embedding.weight.data = _whitened_patches()
    for layer in eyes.encoder.layers:
        _seed_attention(layer.self_attn, layer.self_attn.out_proj, match=0.7, copy=-0.4)


def seed_words(
    model: Idefics3ForConditionalGeneration, directions: dict[int, torch.Tensor]
) -> None:
    """Start the text tower so that a word's token looks like what the image tokens show of it.

    `directions` gives, by token id, where in an image token the eyes put that colour or form.
    Attention starts by matching like with like and by copying what it finds.
    """
    text = model.model.text_model
    for token, direction in directions.items():
        row = direction / direction.norm() * 0.04 * WIDTH**0.5
        text.embed_tokens.weight.data[token] = row
        model.lm_head.weight.data[token] = row
    for layer in text.layers:
        _seed_attention(layer.self_attn, layer.self_attn.o_proj, match=0.5, copy=0.3)


def _seed_attention(look: torch.nn.Module, out: torch.nn.Linear, match: float, copy: float) -> None:
    """Set W_q W_k^T near `match` and W_v W_o near `copy` times identity, with noise as large."""
    eye, noise = torch.eye(WIDTH), WIDTH**-0.5
    queries, keys = [], []
    for _ in range(WIDTH // HEAD):
        u, s, v = torch.linalg.svd(match * eye + match * noise * torch.randn(WIDTH, WIDTH))
        turn = torch.linalg.qr(torch.randn(HEAD, HEAD))[0]
        queries.append(turn @ (u[:, :HEAD] * s[:HEAD].sqrt()).T)
        keys.append(turn @ (s[:HEAD, None].sqrt() * v[:HEAD]))
    look.q_proj.weight.data, look.k_proj.weight.data = torch.cat(queries), torch.cat(keys)
    u, s, v = torch.linalg.svd(copy * eye + abs(copy) * noise * torch.randn(WIDTH, WIDTH))
    look.v_proj.weight.data = (s.sqrt()[:, None] * v).contiguous()
    out.weight.data = (u * s.sqrt()).contiguous()


def _waves(side: int) -> torch.Tensor:
    """Sine and cosine position embeddings of a side x side grid, row by row."""
    speed = 30 ** -torch.linspace(0, 1, WIDTH // 4)
    angle = torch.arange(side)[:, None] * speed
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return 0.7 * torch.cat([rows, columns], 2).reshape(side * side, WIDTH)


def _whitened_patches() -> torch.Tensor:
    """Patch weights: the cosine transform, its flat part damped, in a random rotation."""
    n = torch.arange(PATCH)
    wave = torch.cos(torch.pi / PATCH * (n + 0.5) * n[:, None]) * (2 / PATCH) ** 0.5
    wave[0] /= 2**0.5
    basis = torch.einsum("ai,bj,cd->cabdij", wave, wave, torch.eye(3))
    basis = basis.reshape(WIDTH, 3, PATCH, PATCH).clone()
    gain = torch.full((3, PATCH, PATCH), 0.7)
    gain[:, 0, 0] = 0.25
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    return torch.einsum("oc,cdij->odij", rotation * gain.reshape(-1), basis)


def export(model: Idefics3ForConditionalGeneration, folder: Path) -> None:
    """Write the checkpoint as transformers and vLLM load it: weights in half precision."""
    half = copy.deepcopy(model).to(torch.float16)
    half.save_pretrained(folder)
    processor = make_processor()
    processor.save_pretrained(folder)
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    (folder / "tokenizer_config.json").write_text(json.dumps(words, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
