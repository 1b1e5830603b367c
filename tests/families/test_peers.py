"""Our boxes and our image tokens against those of transformers' own code, on random input."""

import random
from types import SimpleNamespace

import pytest

from tests.strategies import upright
from tests.tiny_models import byte_tokenizer
from vlmbatch.families import family_for
from vlmbatch.grounding import Box, GridSpace, Size
from vlmbatch.records import TaskKind

pytest.importorskip("transformers", reason="these compare with transformers")

ANSWERS = 1000
LABELS = ("cat", "a stop sign", "the 2nd dog")


def sized(rng: random.Random) -> Size:
    return Size(rng.randint(1, 4000), rng.randint(1, 4000))


def edges(box: Box) -> tuple[float, ...]:
    return box.x1, box.y1, box.x2, box.y2


def test_kosmos2_boxes_are_those_of_its_processor():
    from transformers import Kosmos2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = byte_tokenizer(("<pad>", "<s>", "</s>", "<unk>"), unk_token="<unk>")
    processor = Kosmos2Processor(CLIPImageProcessorPil(), tokenizer)
    rng, family = random.Random(1), family_for({}, "kosmos2")
    for _ in range(ANSWERS):
        size = sized(rng)
        text = "An image of " + " and ".join(kosmos2_object(rng) for _ in range(rng.randint(1, 4)))
        caption, entities = processor.post_process_generation(text)
        image = upright(size)
        assert family.read(TaskKind.CAPTION, text, labels=(), image=image).text == caption
        expected = [
            GridSpace(1).to_pixels(Box(phrase, *box), size)
            for phrase, _, boxes in entities
            for box in boxes
        ]
        found = family.read(TaskKind.GROUND, text, labels=("x",), image=image).boxes
        assert [box.label for box in found] == [box.label for box in expected if box]
        for ours, theirs in zip(found, filter(None, expected), strict=True):
            assert edges(ours) == pytest.approx(edges(theirs), abs=1e-6)


def kosmos2_object(rng: random.Random) -> str:
    pairs = [
        f"<patch_index_{rng.randrange(1024):04}><patch_index_{rng.randrange(1024):04}>"
        for _ in range(rng.randint(1, 3))
    ]
    objects = "</delimiter_of_multi_objects/>".join(pairs)
    return f"<phrase> {rng.choice(LABELS)}</phrase><object>{objects}</object>"


def test_florence2_boxes_are_those_of_its_processor():
    from transformers import Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = byte_tokenizer(
        ("<pad>", "<s>", "</s>", "<image>"), extra_special_tokens={"image_token": "<image>"}
    )
    images = CLIPImageProcessorPil()
    images.image_seq_length = 577
    tasks = ("description_with_bboxes", "phrase_grounding", "ocr")
    processor = Florence2Processor(
        images,
        tokenizer,
        post_processor_config={
            **{task: {} for task in tasks},
            "ocr": {"pattern": None, "area_threshold": 0.0},
            "phrase_grounding": {"banned_grounding_tokens": []},
            "description_with_bboxes": {},
        },
    )
    rng, family = random.Random(2), family_for({}, "florence2")
    for _ in range(ANSWERS):
        size = sized(rng)
        image = upright(size)
        text = "</s><s>" + "".join(florence2_object(rng) for _ in range(rng.randint(0, 4))) + "</s>"
        for task in ("<OD>", "<CAPTION_TO_PHRASE_GROUNDING>"):
            theirs = processor.post_process_generation(
                text=text, task=task, image_size=(size.width, size.height)
            )[task]
            found = family.read(TaskKind.DETECT, text, labels=(), image=image).boxes
            compare(found, theirs["bboxes"], theirs["labels"], size)


def florence2_object(rng: random.Random) -> str:
    values = [rng.randrange(1000) for _ in range(4 * rng.randint(1, 3))]
    for at in range(0, len(values), 2):  # never the same bin twice on an axis
        values[at] = values[at] // 2 * 2 + (at // 2) % 2
        values[at + 1] = values[at + 1] // 2 * 2 + (at // 2) % 2
    return rng.choice(LABELS) + "".join(f"<loc_{value}>" for value in values)


def compare(found, bboxes, labels, size) -> None:
    """Theirs are cut to whole pixels, not sorted and not clipped."""
    assert [box.label for box in found] == labels
    for ours, (x1, y1, x2, y2) in zip(found, bboxes, strict=True):
        theirs = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        for mine, other in zip(edges(ours), theirs, strict=True):
            assert -1e-3 <= mine - other <= 1 + 1e-3


def test_florence2_regions_are_those_of_its_post_processor():
    from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

    tokenizer = byte_tokenizer(("<pad>", "<s>", "</s>"))
    theirs_of = Florence2PostProcessor({"ocr": {}}, tokenizer).parse_ocr_from_text_and_spans
    rng, family = random.Random(3), family_for({}, "florence2")
    for _ in range(ANSWERS):
        size = Size(rng.randint(50, 4000), rng.randint(50, 4000))
        text = ""
        for _ in range(rng.randint(1, 4)):
            x, y = rng.randrange(900), rng.randrange(900)
            quad = (x, y, x + 90, y + 1, x + 91, y + 60, x + 2, y + 61)
            text += rng.choice(LABELS) + "".join(f"<loc_{value}>" for value in quad)
        theirs = theirs_of(text, None, image_size=(size.width, size.height))
        found = family.read(TaskKind.OCR, f"<s>{text}</s>", labels=(), image=upright(size))
        assert found.text == "\n".join(item["text"] for item in theirs)
        boxes = [
            (min(q[::2]), min(q[1::2]), max(q[::2]), max(q[1::2]))
            for q in (item["quad_box"] for item in theirs)
        ]
        compare(found.boxes, boxes, [item["text"] for item in theirs], size)


def test_fuyu_boxes_are_those_of_its_processor_where_they_are_well_formed():
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.fuyu.processing_fuyu import FuyuProcessor

    numbers = [str(number) for number in range(9000)]
    words = ["<unk>", "▁see", *(f"<0x0{i}>" for i in range(5)), *numbers]
    words += ["<", ">", "/", "box", ",", "▁<", "▁"]
    model = models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>")
    wordlevel = Tokenizer(model)
    wordlevel.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=wordlevel, unk_token="<unk>")
    processor = SimpleNamespace(
        tokenizer=tokenizer,
        image_processor=SimpleNamespace(size={"height": 1080, "width": 1920}),
    )
    rng, family = random.Random(4), family_for({}, "fuyu")
    for _ in range(ANSWERS):
        size = Size(rng.randint(100, 4000), rng.randint(100, 4000))
        seen = family.target(size)
        y = sorted(rng.sample(range(seen.height // 2 + 1), 2))
        x = sorted(rng.sample(range(seen.width // 2 + 1), 2))
        tokens = ["▁see", "<0x00>", *map(str, (y[0], x[0], y[1], x[1])), "<0x01>"]
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])
        sizes = torch.tensor([[size.height, size.width]])
        (changed,) = FuyuProcessor.post_process_box_coordinates(processor, ids, sizes)
        said = tokenizer.convert_ids_to_tokens(changed)
        top, left, bottom, right = (int(word) for word in said if word.isdigit())
        text = family.text_of(tokens)
        (box,) = family.read(TaskKind.GROUND, text, labels=("a",), image=upright(size)).boxes
        theirs = (left, top, right, bottom)
        # They cut to whole pixels, double after that, do not clip, and forget that the resized
        # image was cut to whole pixels.
        off = 2 + 1.1 * max(size.width / seen.width, size.height / seen.height)
        limits = (size.width, size.height) * 2
        for ours, other, limit in zip(edges(box), theirs, limits, strict=True):
            assert abs(ours - min(other, limit)) <= off


# Image tokens


def test_llava_next_tokens_are_those_of_its_processor():
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor as Theirs

    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    fake = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        patch_size=14,
        num_additional_image_tokens=0,
    )
    fake._get_unpadded_features = Theirs._get_unpadded_features.__get__(fake)
    rng, family = random.Random(5), family_for({}, "llava_next")
    for _ in range(ANSWERS):
        size = sized(rng)
        theirs = Theirs._get_number_of_features(fake, size.height, size.width, 336, 336)
        assert family.image_tokens(size) == theirs


def test_llava_onevision_tokens_are_those_of_its_processor():
    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor as Theirs,
    )

    pinpoints = [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)]
    fake = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    fake._get_unpadded_features = Theirs._get_unpadded_features.__get__(fake)
    rng, family = random.Random(6), family_for({}, "llava_onevision")
    for _ in range(ANSWERS):
        size = sized(rng)
        theirs = Theirs._get_number_of_features(fake, size.height, size.width, 384, 384)
        assert family.image_tokens(size) == theirs


def test_idefics3_tokens_are_those_of_its_image_processor():
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    rng = random.Random(7)
    for side, patch, scale, tokens in ((364, 14, 2, 169), (384, 14, 3, 81), (512, 16, 4, 64)):
        config = {
            "vision_config": {"image_size": side, "patch_size": patch},
            "scale_factor": scale,
        }
        family = family_for({"model_type": "idefics3", **config})
        theirs = Idefics3ImageProcessorPil(
            size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side}
        )
        for _ in range(ANSWERS // 3):
            size = sized(rng)
            _, rows, columns = theirs.get_number_of_image_patches(size.height, size.width)
            expected = tokens + 3 + rows * ((tokens + 2) * columns + 1)
            assert family.image_tokens(size) == expected, size


def test_aya_tiles_are_those_of_its_image_processor():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    rng, family = random.Random(8), family_for({}, "aya_vision")
    for _ in range(ANSWERS):
        size = sized(rng)
        columns, rows = get_optimal_tiled_canvas((size.height, size.width), (364, 364), 1, 12)
        tiles = columns * rows if columns * rows > 1 else 0
        assert family.image_tokens(size) == 169 + 3 + 170 * tiles


def test_pixtral_sizes_are_those_of_its_image_processor():
    import numpy as np
    from transformers.models.pixtral.image_processing_pil_pixtral import (
        get_resize_output_image_size,
    )

    rng = random.Random(9)
    for long_edge, patch in ((1024, 16), (1540, 28)):
        config = {"vision_config": {"image_size": long_edge, "patch_size": patch}}
        family = family_for({"model_type": "pixtral", **config})
        for _ in range(100):
            size = Size(rng.randint(10, 4000), rng.randint(10, 4000))
            pixels = np.broadcast_to(np.zeros(1), (size.height, size.width, 3))
            height, width = get_resize_output_image_size(
                pixels, size=(long_edge, long_edge), patch_size=(patch, patch)
            )
            assert family.image_tokens(size) == (width // patch + 1) * (height // patch)


def test_llama4_tiles_are_those_of_its_image_processor():
    """Its module needs torchvision, these functions of it do not."""
    import ast
    from collections import defaultdict
    from functools import lru_cache
    from pathlib import Path

    import torch
    import transformers

    file = Path(transformers.__file__).parent / "models/llama4/image_processing_llama4.py"
    wanted = ("get_factors", "find_supported_resolutions", "get_best_fit")
    functions = [
        node
        for node in ast.parse(file.read_bytes()).body
        if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    names = {"torch": torch, "lru_cache": lru_cache, "defaultdict": defaultdict}
    names["SizeDict"] = SimpleNamespace
    exec(compile(ast.Module(functions, []), str(file), "exec"), names)
    square = SimpleNamespace(height=336, width=336)
    canvases = torch.tensor(names["find_supported_resolutions"].__wrapped__(16, square))
    rng, family = random.Random(10), family_for({}, "llama4")
    for _ in range(ANSWERS):
        size = sized(rng)
        height, width = names["get_best_fit"]((size.height, size.width), canvases)
        tiles = int(height) // 336 * (int(width) // 336)
        assert family.image_tokens(size) == 147 + (145 * tiles if tiles > 1 else 0), size
