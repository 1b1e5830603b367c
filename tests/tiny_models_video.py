"""Tiny checkpoints of the families whose processors need torchvision, taught one answer per task.

Real architectures and processors, built from config classes without downloads, with about 0.3
million parameters. Each learns to answer every task of its family about any picture as its family
would write it: ``TEXTS``, ``PHRASE`` at the first of ``BOXES`` for ground, ``LABELS`` at all of
them for detect. Head size and width are such that vLLM takes them on the CPU.

    PYTHONPATH=... python -m tests.tiny_models_video FOLDER qwen2_vl internvl ...

``environment`` has the PYTHONPATH that makes torchvision importable.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.tiny_models import CHAT_TEMPLATE as USER_ASSISTANT
from tests.tiny_models import byte_tokenizer
from vlmbatch.families import entry_named, family_for
from vlmbatch.families.base import Family
from vlmbatch.grounding import Box, Size
from vlmbatch.models import resolve_model
from vlmbatch.records import LoadedImage, TaskKind
from vlmbatch.tasks import Ask

ROOT = Path(__file__).parent.parent
TORCHVISION = ROOT / ".torchvision"
MISSING = "torchvision is not installed here: make torchvision"

SIZES = (Size(128, 112), Size(100, 140), Size(300, 200), Size(40, 40))
"""Of the pictures; one is upright, the last smaller than some processors' minimum."""
QUESTION, PHRASE, LABELS = "What colour is it?", "the red cup", ("cup", "dog")
TEXTS = {TaskKind.CAPTION: "a red cup", TaskKind.VQA: "red", TaskKind.OCR: "STOP"}
TAGGED = {
    ("qwen2_vl", TaskKind.CAPTION): "a <|object_ref_start|>red cup<|object_ref_end|>"
    "<|box_start|>(250,125),(750,625)<|box_end|>",
    ("internvl", TaskKind.CAPTION): "a <ref>red cup</ref><box>[[250, 125, 750, 625]]</box>",
    ("glm4v", TaskKind.VQA): "<|begin_of_box|>red<|end_of_box|>",
    ("qwen3_vl", TaskKind.VQA): "<think>\nA cup.\n</think>\n\nred",
}
"""How a family says one of TEXTS, where that is not the text alone."""
CANVAS = 112
BOXES = ((28, 14, 84, 70), (14, 56, 42, 98))
"""x1 y1 x2 y2 of a picture of CANVAS x CANVAS; of any other one, the same coordinates as the model
says them, whatever they mean there."""

MOST_STEPS, RATE, SURE = 300, 4e-3, 0.2
CONTEXT = 2048


def environment(torchvision: Path = TORCHVISION) -> dict[str, str]:
    """Environment variables with which a process can import torchvision, and this repository."""
    folders = [ROOT / "tests" / "torchvision_site", torchvision, ROOT]
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, folders), *([before] if before else [])])
    return {**os.environ, "PYTHONPATH": path}


def pictures() -> list[Image.Image]:
    """One per size, of noise."""
    chance = random.Random(1)
    made = []
    for size in SIZES:
        small = Image.frombytes("RGB", (8, 8), chance.randbytes(192))
        made.append(small.resize((size.width, size.height)))
    return made


def asks(tasks: Sequence[TaskKind]) -> list[Ask]:
    words: dict[TaskKind, dict[str, Any]] = {
        TaskKind.VQA: {"question": QUESTION},
        TaskKind.GROUND: {"question": PHRASE, "labels": (PHRASE,)},
        TaskKind.DETECT: {"labels": LABELS},
    }
    return [Ask(kind, **words.get(kind, {})) for kind in tasks]


def answer(family: Family, kind: TaskKind) -> str:
    """What the model learns to say."""
    if kind in TEXTS:
        return TAGGED.get((family.name, kind), TEXTS[kind])
    canvas = Image.new("RGB", (CANVAS, CANVAS))
    labels = (PHRASE,) if kind is TaskKind.GROUND else LABELS
    boxes = [Box(label, *edges) for label, edges in zip(labels, BOXES, strict=False)]
    return family.write(boxes, image=LoadedImage(canvas, Size(CANVAS, CANVAS), "canvas"))


# building: each gives the model's class, its config and its processor


Parts = tuple[Any, Any, Any]
CHATML = (
    "{{% for message in messages %}}{first}<|im_start|>{{{{ message['role'] }}}}\n"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
    "{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
HELPFUL = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_TOKENS = (
    *CHATML_TOKENS,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
)


def decoder(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """The language model's config."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def mrope(*section: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": list(section),
        **more,
    }


def encoder(side: int, patch: int, **more: Any) -> dict[str, Any]:
    """The config of a vision transformer."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
        **more,
    }


def _tokenizer(specials: Sequence[str], texts: Sequence[str], **names: Any) -> Any:
    """Knows the words of these texts, and all other text by its bytes."""
    rest = list(specials[3:])
    blank = byte_tokenizer(specials, additional_special_tokens=rest, **names)
    # An empty line is one token in every published one.
    return blank.train_new_from_iterator([*texts, "\n\n"], 700, show_progress=False)


def qwen2_vl(texts: Sequence[str]) -> Parts:
    import transformers as t

    return t.Qwen2VLForConditionalGeneration, *_qwen(
        texts,
        t.Qwen2VLConfig,
        t.Qwen2VLProcessor,
        t.Qwen2VLVideoProcessor,
        patch=14,
        system=True,
        vision={"embed_dim": 32, "hidden_size": 128, "depth": 1, "num_heads": 2, "mlp_ratio": 2},
        text={"rope_parameters": mrope(8, 12, 12)},
    )


def qwen2_5_vl(texts: Sequence[str]) -> Parts:
    import transformers as t

    return t.Qwen2_5_VLForConditionalGeneration, *_qwen(
        texts,
        t.Qwen2_5_VLConfig,
        t.Qwen2_5_VLProcessor,
        t.Qwen2VLVideoProcessor,
        patch=14,
        system=True,
        vision={
            "hidden_size": 32,
            "out_hidden_size": 128,
            "intermediate_size": 64,
            "depth": 1,
            "num_heads": 2,
            "fullatt_block_indexes": [0],
        },
        text={"rope_parameters": mrope(8, 12, 12)},
    )


def qwen3_vl(texts: Sequence[str]) -> Parts:
    import transformers as t

    return t.Qwen3VLForConditionalGeneration, *_qwen(
        texts,
        t.Qwen3VLConfig,
        t.Qwen3VLProcessor,
        t.Qwen3VLVideoProcessor,
        patch=16,
        system=False,
        vision={
            "hidden_size": 32,
            "out_hidden_size": 128,
            "intermediate_size": 64,
            "depth": 1,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text={"rope_parameters": mrope(12, 10, 10, mrope_interleaved=True)},
    )


def _qwen(
    texts: Sequence[str],
    config: Any,
    processor: Any,
    videos: Any,
    *,
    patch: int,
    system: bool,
    vision: dict[str, Any],
    text: dict[str, Any],
) -> tuple[Any, Any]:
    import transformers as t

    tokenizer = _tokenizer(QWEN_TOKENS, texts)
    cell = 2 * patch
    size = {"shortest_edge": 16 * cell**2, "longest_edge": 36 * cell**2}
    images = t.Qwen2VLImageProcessor(patch_size=patch, merge_size=2, size=size)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    template = CHATML.format(first=HELPFUL if system else "", image=image)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    made = config(
        text_config=decoder(tokenizer, **text),
        vision_config={"patch_size": patch, "spatial_merge_size": 2, **vision},
        tie_word_embeddings=True,
        **ids,
    )
    shown = videos(patch_size=patch, merge_size=2, size=size)
    return made, processor(images, tokenizer, shown, chat_template=template)


def internvl(texts: Sequence[str]) -> Parts:
    import transformers as t

    tile = 56
    own = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tags = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
    tokenizer = _tokenizer((*CHATML_TOKENS, *own.values(), *tags), texts, extra_special_tokens=own)
    images = t.GotOcr2ImageProcessor(
        size={"height": tile, "width": tile}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = t.InternVLProcessor(
        images,
        tokenizer,
        t.InternVLVideoProcessor(size={"height": tile, "width": tile}),
        image_seq_length=4,
        chat_template=CHATML.format(first="", image="<IMG_CONTEXT>\n"),
    )
    config = t.InternVLConfig(
        text_config={"model_type": "qwen2", **decoder(tokenizer)},
        vision_config=encoder(tile, 14, image_size=[tile, tile], patch_size=[14, 14]),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    return t.InternVLForConditionalGeneration, config, processor


def smolvlm(texts: Sequence[str]) -> Parts:
    import transformers as t

    tile = 56
    tokens = ("<|endoftext|>", "<|im_start|>", "<end_of_utterance>")
    own = ("<image>", "<fake_token_around_image>", "<global-img>", "<video>")
    cells = tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))
    tokenizer = _tokenizer((*tokens, *own, *cells), texts)
    long_edge, square = {"longest_edge": 4 * tile}, {"longest_edge": tile}
    processor = t.SmolVLMProcessor(
        t.SmolVLMImageProcessor(size=long_edge, max_image_size=square, do_image_splitting=True),
        tokenizer,
        t.SmolVLMVideoProcessor(size=long_edge, max_image_size=square),
        image_seq_len=4,
        chat_template=USER_ASSISTANT,
    )
    config = t.SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        vision_config=encoder(tile, 14),
        text_config={"model_type": "llama", **decoder(tokenizer)},
        tie_word_embeddings=True,
    )
    return t.SmolVLMForConditionalGeneration, config, processor


def mistral3(texts: Sequence[str]) -> Parts:
    import transformers as t

    own = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = _tokenizer(("<pad>", "<s>", "</s>", *own), texts)
    side, patch = 112, 14
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}[/INST]"
        "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
    )
    processor = t.PixtralProcessor(
        t.PixtralImageProcessor(size={"longest_edge": side}, patch_size=patch),
        tokenizer,
        patch_size=patch,
        spatial_merge_size=2,
        chat_template=template,
    )
    config = t.Mistral3Config(
        text_config={
            "model_type": "mistral",
            **decoder(tokenizer, bos_token_id=tokenizer.bos_token_id),
        },
        vision_config={"model_type": "pixtral", **encoder(side, patch)},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=True,
    )
    return t.Mistral3ForConditionalGeneration, config, processor


def llava_onevision(texts: Sequence[str]) -> Parts:
    import transformers as t

    side = 56
    tokenizer = _tokenizer((*CHATML_TOKENS, "<image>", "<video>"), texts)
    pinpoints = [[side * rows, side * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    square = {"height": side, "width": side}
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} "
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}"
        "{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        "\n{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor = t.LlavaOnevisionProcessor(
        t.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints),
        tokenizer,
        t.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    config = t.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **decoder(tokenizer)},
        vision_config={
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            **encoder(side, 14),
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=True,
    )
    return t.LlavaOnevisionForConditionalGeneration, config, processor


def glm4v(texts: Sequence[str]) -> Parts:
    import transformers as t

    own = {
        "image": "<|image|>",
        "video": "<|video|>",
        "image_start": "<|begin_of_image|>",
        "image_end": "<|end_of_image|>",
        "video_start": "<|begin_of_video|>",
        "video_end": "<|end_of_video|>",
    }
    more = ("[gMASK]", "<sop>", "<|assistant|>", "<|begin_of_box|>", "<|end_of_box|>")
    words = ("<|endoftext|>", "<|system|>", "<|user|>", *own.values(), *more)
    tokenizer = _tokenizer(words, texts)
    template = (
        "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    size = {"shortest_edge": 2 * 112**2, "longest_edge": 2 * 168**2}
    processor = t.Glm4vProcessor(
        t.Glm4vImageProcessor(size=size, patch_size=14, merge_size=2),
        tokenizer,
        t.Glm4vVideoProcessor(size=size, patch_size=14, merge_size=2),
        chat_template=template,
    )
    config = t.Glm4vConfig(
        text_config=decoder(tokenizer, rope_parameters=mrope(4, 6, 6, partial_rotary_factor=0.5)),
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "image_size": 112,
            "patch_size": 14,
            "out_hidden_size": 128,
            "intermediate_size": 64,
        },
        tie_word_embeddings=True,
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in own.items()
        },
    )
    return t.Glm4vForConditionalGeneration, config, processor


BUILDERS: dict[str, tuple[Callable[[Sequence[str]], Parts], str]] = {
    "qwen2_vl": (qwen2_vl, "qwen2_vl"),
    "qwen2_5_vl": (qwen2_5_vl, "qwen2_5_vl"),
    "qwen3_vl": (qwen3_vl, "qwen3_vl"),
    "internvl": (internvl, "internvl"),
    "smolvlm": (smolvlm, "idefics3"),
    "mistral3": (mistral3, "pixtral"),
    "llava_onevision": (llava_onevision, "llava_onevision"),
    "glm4v": (glm4v, "glm4v"),
}
"""Each checkpoint's builder, and the family that its config.json must be recognised as."""


def build(folder: Path, name: str, seed: int = 0) -> Path:
    """The taught checkpoint, saved as transformers saves one, and its ``measured.json``."""
    import torch

    builder, family_name = BUILDERS[name]
    kinds = entry_named(family_name).tasks
    any_of_it = entry_named(family_name).make({})
    texts = [any_of_it.word(ask) for ask in asks(kinds)]
    texts += [_teachable(any_of_it, kind) for kind in kinds]
    make_model, config, processor = builder(texts)
    torch.manual_seed(seed)
    model = make_model(config)
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    family = family_for(resolve_model(str(folder)).config)
    lessons = [(family.word(ask), answer(family, ask.kind)) for ask in asks(kinds)]
    steps = teach(model, processor, family, lessons)
    model.save_pretrained(folder)
    if name in NAMED_AS_ON_THE_HUB:
        _rename(folder / "model.safetensors", NAMED_AS_ON_THE_HUB[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: {count:,} parameters, taught in {steps} steps", file=sys.stderr)
    measured = [measured_tokens(family, processor, size) for size in (*SIZES, *other_sizes())]
    (folder / MEASURED).write_text(json.dumps(measured))
    return folder


def _teachable(family: Family, kind: TaskKind) -> str:
    try:
        return answer(family, kind)
    except ValueError:
        return ""


NAMED_AS_ON_THE_HUB = {"llava_onevision": ("vision_tower.", "vision_tower.vision_model.")}
"""Beginnings of weights' names as transformers 5.19 saves them, and as they are published: vLLM
0.32 knows only these, transformers both."""


def _rename(file: Path, names: tuple[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    saved, published = names
    weights = load_file(file)
    renamed = {name.replace(saved, published, 1): weight for name, weight in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})


def teach(model: Any, processor: Any, family: Family, lessons: Sequence[tuple[str, str]]) -> int:
    """Adam, until every token of every answer is likely about every picture; the steps it took."""
    import torch

    batches = []
    for picture in pictures():
        given = family.target(Size(*picture.size))
        seen = family.prepare(picture.resize((given.width, given.height)))
        batches.append(_batch(processor, seen, lessons))
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    worst = [9.0] * len(batches)
    model.train()
    for step in range(MOST_STEPS):
        inputs, learnt = batches[step % len(batches)]
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10)
        logits = model(**inputs).logits[:, :-1][learnt]
        losses = torch.nn.functional.cross_entropy(
            logits, inputs["input_ids"][:, 1:][learnt], reduction="none"
        )
        optimiser.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        worst[step % len(batches)] = losses.max().item()
        if max(worst) < SURE and _knows(model, batches):  # each was measured some steps ago
            model.eval()
            return step + 1
    raise RuntimeError(f"not learnt in {MOST_STEPS} steps: {worst}")


def _knows(model: Any, batches: Sequence[tuple[Any, Any]]) -> bool:
    """Whether the model as it is now finds every token of every answer likely."""
    import torch

    with torch.no_grad():
        return all(
            torch.nn.functional.cross_entropy(
                model(**inputs).logits[:, :-1][learnt],
                inputs["input_ids"][:, 1:][learnt],
                reduction="none",
            )
            .max()
            .item()
            < SURE
            for inputs, learnt in batches
        )


def _batch(
    processor: Any, picture: Image.Image, lessons: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], Any]:
    """All lessons about one picture, and of which next tokens the answers consist."""
    prompts = []
    for prompt, _ in lessons:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        message = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(message, add_generation_prompt=True))
    whole = [
        prompt + said + processor.tokenizer.eos_token
        for prompt, (_, said) in zip(prompts, lessons, strict=True)
    ]
    options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
    images = [[picture]] * len(lessons)
    asked = processor(text=prompts, images=images, **options)
    batch = dict(processor(text=whole, images=images, **options))
    of_prompt = asked["attention_mask"].sum(1, keepdim=True)
    place = batch["attention_mask"].cumsum(1)  # from 1, whichever side is padded
    learnt = (batch["attention_mask"] == 1) & (place > of_prompt)
    return batch, learnt[:, 1:]


# what the real processors make of sizes


MEASURED = "measured.json"
"""A list of {size, given, tokens, grid}, sizes as [width, height]: of an image of ``size`` that is
shrunk to ``given`` for the engine the prompt tokens, and the grid that Qwen's processors resize it
to; null where the processor refuses the image."""

GRIDS = {
    "default": {},
    "pixels": {"min_pixels": 8 * 28 * 28, "max_pixels": 200 * 28 * 28},
    "edges": {"size": {"shortest_edge": 50_000, "longest_edge": 150_000}},
    "patches": {
        "size": {"shortest_edge": 4 * 1024, "longest_edge": 99 * 1024},
        "patch_size": 16,
    },
}
"""Settings of an image processor, as preprocessor_config.json on the Hub spells them."""


def other_sizes(seed: int = 2, count: int = 18) -> list[Size]:
    """Of any shape up to 1 : 20, from a few pixels to some hundred."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        long, shape = chance.choice((20, 90, 400, 900)), chance.choice((1.0, 1.5, 4.0, 20.0))
        edges = [chance.randint(long // 2, long), max(1, int(long / chance.uniform(1.0, shape)))]
        chance.shuffle(edges)
        made.append(Size(*edges))
    return made


def extreme_sizes(seed: int = 3, count: int = 200) -> list[Size]:
    """From 1 pixel to 9000, and of any shape."""
    chance = random.Random(seed)
    longest = [chance.choice((5, 60, 600, 1500, 9000)) for _ in range(count - 2)]
    sizes = [Size(chance.randint(1, n), chance.randint(1, n)) for n in longest]
    return [Size(1, 1), Size(9000, 45), *sizes]


def measured_tokens(family: Family, processor: Any, size: Size) -> dict[str, Any]:
    given = family.target(size)
    picture = family.prepare(Image.new("RGB", (given.width, given.height), "red"))
    tokenizer = processor.tokenizer
    # InternVL's own tokenizer calls it the context image token.
    token = getattr(tokenizer, "context_image_token", None) or processor.image_token
    found: dict[str, Any] = {"tokens": None, "grid": None}
    try:
        inputs = processor(text=[f"a{token}b"], images=[[picture]], return_tensors="pt")
    except ValueError as error:
        if "aspect ratio" not in str(error):
            raise
    else:
        words = len(tokenizer(f"a{token}b")["input_ids"]) - 1
        found = {"tokens": inputs["input_ids"].shape[1] - words, "grid": None}
        if "image_grid_thw" in inputs:
            found["grid"] = _grid(inputs, processor.image_processor)
    sizes = {"size": [size.width, size.height], "given": [given.width, given.height]}
    return {**sizes, **found}


def measure_grids(folder: Path) -> None:
    """For each of GRIDS a folder with the configs of a Qwen2.5-VL and its ``measured.json``."""
    from transformers import AutoImageProcessor

    for name, settings in GRIDS.items():
        own = folder / name
        own.mkdir(parents=True)
        whole = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2, **settings}
        (own / "preprocessor_config.json").write_text(json.dumps(whole))
        (own / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
        processor = AutoImageProcessor.from_pretrained(own)
        family = family_for(resolve_model(str(own)).config)
        measured = []
        for size in extreme_sizes():
            given = family.target(size)
            picture = Image.new("RGB", (given.width, given.height))
            try:
                grid = _grid(processor(images=picture, return_tensors="pt"), processor)
            except ValueError as error:
                if "aspect ratio" not in str(error):
                    raise
                grid = None
            measured.append(
                {
                    "size": [size.width, size.height],
                    "given": [given.width, given.height],
                    "grid": grid,
                }
            )
        (own / MEASURED).write_text(json.dumps(measured))


def _grid(inputs: Any, images: Any) -> list[int]:
    """Width and height in pixels."""
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    return [columns * images.patch_size, rows * images.patch_size]


def main() -> None:
    """Build what is named, or everything and the measured grids."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names or BUILDERS:
        build(folder / name, name)
    if not names:
        measure_grids(folder / "grids")


if __name__ == "__main__":
    main()
