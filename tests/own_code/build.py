"""Checkpoints that bring their own code: stand-ins with the real ones' classes, entry points and
signatures, a palette for weights, and a tokenizer of bytes. Needs torch only to write weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REMOTE = Path(__file__).parent / "remote"
PAD, BOS, EOS, END = "<pad>", "<s>", "<|endoftext|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "<assistant>"
)


@dataclass(frozen=True)
class StandIn:
    """A checkpoint's code and config. ``weight``: the name of its palette."""

    module: str
    model_type: str
    config: str
    model: str
    weight: str = "eye.palette"
    auto: str = "AutoModelForCausalLM"
    others: dict[str, str] = field(default_factory=dict)
    """More of its auto_map."""
    more: dict[str, Any] = field(default_factory=dict)
    """More of its config.json."""
    tokenizer: bool = True
    """It has a tokenizer.json."""
    files: tuple[str, ...] = ()
    weights: dict[str, int] = field(default_factory=dict)


QWEN_VL = StandIn(
    "modeling_qwen",
    "qwen",
    "QWenConfig",
    "QWenLMHeadModel",
    more={"visual": {"image_size": 448, "image_start_id": 259}},
    tokenizer=False,
)

STAND_INS = {
    "moondream2": StandIn(
        "hf_moondream",
        "moondream1",
        "HfConfig",
        "HfMoondream",
        weight="model.eye.palette",
        tokenizer=False,
    ),
    "moondream3-preview": StandIn(
        "hf_moondream3",
        "moondream3",
        "HfConfig",
        "HfMoondream",
        weight="model.eye.palette",
        tokenizer=False,
        files=("hf_moondream",),
    ),
    "cogvlm-grounding-generalist-hf": StandIn(
        "modeling_cogvlm",
        "cogvlm",
        "CogVLMConfig",
        "CogVLMForCausalLM",
        more={"vision_config": {"image_size": 490, "patch_size": 14}},
    ),
    "Qwen-VL-Chat": QWEN_VL,
    "Qwen-VL": QWEN_VL,
    "Molmo-7B-D-0924": StandIn(
        "modeling_molmo",
        "molmo",
        "MolmoConfig",
        "MolmoForCausalLM",
        others={"AutoProcessor": "MolmoProcessor"},
    ),
    "Phi-3.5-vision-instruct": StandIn(
        "modeling_phi3_v",
        "phi3_v",
        "Phi3VConfig",
        "Phi3VForCausalLM",
        others={"AutoProcessor": "Phi3VProcessor"},
    ),
    "MiniCPM-V-2_6": StandIn(
        "modeling_minicpmv",
        "minicpmv",
        "MiniCPMVConfig",
        "MiniCPMV",
        weight="llm.eye.palette",
        auto="AutoModel",
        others={"AutoProcessor": "MiniCPMVProcessor"},
        weights={"marks": 2},
    ),
}


def build(name: str, folder: Path) -> Path:
    """The stand-in for the checkpoint of this name, in a folder of that name."""
    import torch
    from safetensors.torch import save_file

    made, folder = STAND_INS[name], folder / name
    folder.mkdir(parents=True)
    for file in ("pixels", made.module, *made.files):
        shutil.copy(REMOTE / f"{file}.py", folder)
    classes = {"AutoConfig": made.config, made.auto: made.model, **made.others}
    auto_map: dict[str, Any] = {key: f"{made.module}.{name}" for key, name in classes.items()}
    config = {
        "architectures": [made.model],
        "model_type": made.model_type,
        "auto_map": auto_map,
        "vocab_size": 300,
        "eos_token_id": 256 if made.model_type == "qwen" else 258,
        "pad_token_id": 256,
        "torch_dtype": "float32",
        **made.more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    palette = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 1.0]])
    zeros = {name: torch.zeros(size) for name, size in made.weights.items()}
    save_file({made.weight: palette, **zeros}, folder / "model.safetensors", {"format": "pt"})
    if made.tokenizer:
        _write_tokenizer(folder)
    if made.model_type == "qwen":
        own = {"AutoTokenizer": [f"{made.module}.QWenTokenizer", None]}
        described = {"tokenizer_class": "QWenTokenizer", "auto_map": own}
        (folder / "tokenizer_config.json").write_text(json.dumps(described))
    if "AutoProcessor" in made.others:
        described = {
            "processor_class": made.others["AutoProcessor"],
            "auto_map": {"AutoProcessor": auto_map["AutoProcessor"]},
        }
        for file in ("processor_config.json", "preprocessor_config.json"):
            (folder / file).write_text(json.dumps(described))
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A byte is its own id; the specials come after them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    table = _bytes_to_unicode()
    bpe = Tokenizer(models.BPE(vocab={table[byte]: byte for byte in range(256)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, special=True) for text in (PAD, BOS, EOS, END)])
    bpe.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def _bytes_to_unicode() -> dict[int, str]:
    """The characters by which a byte-level BPE names bytes: printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + at) for at, byte in enumerate(others)
    }
