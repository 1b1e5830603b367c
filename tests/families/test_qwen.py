"""Four generations of Qwen-VL, four coordinate spaces."""

import random

import pytest
from PIL import Image

from tests.strategies import upright
from vlmbatch.errors import ErrorCode, RequestFailed
from vlmbatch.families import family_for
from vlmbatch.families.qwen import Qwen2VL, Qwen3VL, Qwen25VL, QwenVL, QwenVLChat
from vlmbatch.families.sizes import smart_resize, too_long
from vlmbatch.grounding import Box, Point, Size
from vlmbatch.records import IMAGE, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

SIZE = Size(1998, 999)
APPLES = (  # from the README of Qwen-VL
    "<ref> Two apples</ref><box>(302,257),(582,671)</box><box>(603,252),(878,642)</box> and"
    "<ref> a bowl</ref><box>(2,269),(304,674)</box>"
)
GIVEN_MAX = {"preprocessor": {"max_pixels": 1_003_520}}


def boxes(family, text, size=SIZE, kind=TaskKind.DETECT, labels=("a", "b")):
    return family.read(kind, text, labels=labels, image=upright(size)).boxes


def test_qwen_vl_counts_to_999():
    assert boxes(QwenVLChat(), APPLES) == (
        Box("Two apples", 604, 257, 1164, 671),
        Box("Two apples", 1206, 252, 1756, 642),
        Box("a bowl", 4, 269, 608, 674),
    )
    whole = boxes(QwenVLChat(), "<box>(0,0),(999,999)</box>", kind=TaskKind.GROUND, labels=("it",))
    assert whole == (Box("it", 0, 0, 1998, 999),)


def test_qwen_vls_text_keeps_the_references():
    text = QwenVL().read(TaskKind.CAPTION, APPLES, labels=(), image=upright(SIZE)).text
    assert text == "Two apples and a bowl"


def test_the_base_model_goes_on_inside_of_the_box():
    ask = Ask(TaskKind.GROUND, question="the cat", labels=("the cat",))
    assert QwenVL().word(ask) == f"{IMAGE}<ref>the cat</ref><box>"
    for text in ("(0,0),(999,333)</box>", "(0,0),(999,333)", "<box>(0,0),(999,333)</box> is"):
        found = boxes(QwenVL(), text, kind=TaskKind.GROUND, labels=("the cat",))
        assert found == (Box("the cat", 0, 0, 1998, 333),)


def test_the_chat_model_has_its_whole_prompt():
    assert QwenVLChat().word(Ask(TaskKind.VQA, question="Why?")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"Picture 1: {IMAGE}\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "the bounding box of a, b" in QwenVLChat().word(Ask(TaskKind.DETECT, labels=("a", "b")))


def test_qwen_vl_knows_quadrilaterals():
    text = "<ref>sign</ref><quad>(10,20),(90,10),(80,60),(0,70)</quad>"
    assert boxes(QwenVLChat(), text, Size(999, 999)) == (Box("sign", 0, 10, 90, 70),)


@pytest.mark.parametrize(
    "text",
    [
        "<|object_ref_start|>the man<|object_ref_end|>"
        "<|box_start|>(100,200),(300,500)<|box_end|><|im_end|>",
        "<|object_ref_start|>the man<|object_ref_end|><|box_start|>(100,200),(300,500)",
        "<|object_ref_start|>the man<|object_ref_end|>"
        "<|box_start|>（300，500），（100，200）<|box_end|>",
        "the man (100,200),(300,500)",
        '```json\n[{"bbox_2d": [100, 200, 300, 500], "label": "the man"}]\n```',
        "<|object_ref_start|>the man<|object_ref_end|><|box_start|>(100,200),(300,500)<|box_end|>"
        "<|box_start|>(1,2),(3",
    ],
)
def test_qwen2_vl_counts_to_1000(text):
    assert boxes(Qwen2VL(), text, Size(2000, 1000)) == (Box("the man", 200, 200, 600, 500),)


def test_qwen2_5_vl_says_pixels_of_the_resized_image():
    """1920 x 1080 becomes 1316 x 728 with a budget of 1,003,520 pixels."""
    family = Qwen25VL(GIVEN_MAX)
    given = family.target(Size(1920, 1080))
    assert given.pixels <= 1_003_520
    image = LoadedImage(Image.new("RGB", (given.width, given.height)), Size(1920, 1080), "key")
    text = '```json\n[\n\t{"bbox_2d": [658, 364, 1316, 728], "label": "猫"}\n]\n```'
    found = family.read(TaskKind.DETECT, text, labels=("猫",), image=image).boxes
    assert found == (Box("猫", 960, 540, 1920, 1080),)
    assert family.write(found, image=image) == text.replace("\n\t", "").replace("\n]", "]")


def test_qwen3_vl_is_relative_whatever_the_size():
    text = '[{"bbox_2d": [100, 200, 300, 1040], "label": "cat"}, {"bbox_2d": [5, 5, 9'
    for pixels in ((1, 1), (640, 480)):
        image = LoadedImage(Image.new("RGB", pixels), Size(2000, 500), "key")
        answer = Qwen3VL().read(TaskKind.GROUND, text, labels=("a cat",), image=image)
        assert answer.boxes == (Box("cat", 200, 100, 600, 500),)


def test_points_come_as_points():
    text = '[{"point_2d": [500, 500], "label": "nose"}, {"point_2d": [1500, 0]}]'
    answer = Qwen3VL().read(TaskKind.GROUND, text, labels=("it",), image=upright(SIZE))
    assert answer.points == (Point("nose", 999, 499.5),)
    assert answer.boxes == ()


@pytest.mark.parametrize("family", [Qwen2VL(), Qwen3VL(), Qwen25VL()])
def test_thoughts_are_not_answers(family):
    image = upright(Size(56, 56))
    thought = '<think>perhaps {"bbox_2d": [1, 1, 9, 9]} or <|box_start|>(1,1),(9,9)<|box_end|>'
    answer = f"{thought}</think>\n\nA cat."
    assert family.read(TaskKind.CAPTION, answer, labels=(), image=image).text == "A cat."
    opened_by_the_template = answer.removeprefix("<think>")
    assert (
        family.read(TaskKind.VQA, opened_by_the_template, labels=(), image=image).text == "A cat."
    )
    assert boxes(family, f"{thought}</think>There are none.", Size(56, 56)) == ()
    with pytest.raises(RequestFailed) as caught:
        boxes(family, thought, Size(56, 56))
    assert caught.value.failure.code is ErrorCode.PARSE_FAILED


def test_every_generation_is_told_by_its_config():
    def name(model_type, model, **config):
        return family_for({"model_type": model_type, **config}, model_id=model).name

    assert name("qwen", "Qwen/Qwen-VL", visual={}) == "qwen_vl"
    assert name("qwen", "Qwen/Qwen-VL-Chat", visual={}) == "qwen_vl_chat"
    assert name("qwen", "Qwen/Qwen-7B-Chat") == "generic"
    assert name("qwen2_vl", "") == "qwen2_vl"
    assert name("qwen2_5_vl", "") == "qwen2_5_vl"
    for later in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"):
        assert name(later, "") == "qwen3_vl"


def test_the_tokens_of_an_image():
    """Measured with the processors on 1080 x 1920 and 3000 x 4000."""
    hd, photo = Size(1920, 1080), Size(4000, 3000)
    assert Qwen25VL(GIVEN_MAX).image_tokens(hd) == 1222
    sizes = {"preprocessor": {"size": {"shortest_edge": 3136, "longest_edge": 1_003_520}}}
    assert Qwen2VL(sizes).image_tokens(hd) == 1222
    assert Qwen25VL().image_tokens(hd) == Qwen2VL().image_tokens(hd) == 2691
    assert Qwen3VL().image_tokens(hd) == 2040
    assert Qwen25VL().image_tokens(photo) == 15301
    assert Qwen25VL().image_tokens(Size(10_000, 40)) is None
    assert QwenVL().image_tokens(hd) == 256


def test_resizing_is_that_of_transformers():
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = random.Random(7)
    for _ in range(1_000):
        longest = rng.choice((60, 600, 6000))
        size = Size(rng.randint(1, longest), rng.randint(1, longest))
        factor, least = rng.choice((28, 32)), rng.choice((3136, 65536))
        most = rng.choice((least, 200_704, 1_003_520, 12_845_056))
        if too_long(size):
            with pytest.raises(ValueError, match="aspect ratio"):
                theirs.smart_resize(size.height, size.width, factor, least, most)
            continue
        height, width = theirs.smart_resize(size.height, size.width, factor, least, most)
        if min(height, width) > 0:  # it can round an edge down to nothing, and then fails
            assert smart_resize(size, factor, least, most) == Size(width, height), size


def test_the_loader_shrinks_to_the_budget_and_never_enlarges():
    rng = random.Random(8)
    family = Qwen25VL(GIVEN_MAX)
    for _ in range(1_000):
        size = Size(rng.randint(1, 9000), rng.randint(1, 9000))
        target = family.target(size)
        assert target.pixels <= max(1_003_520, 1)
        assert target == size or target.pixels < size.pixels
        assert family.target(target) == target
        assert abs(target.width * size.height - target.height * size.width) <= 2 * max(
            size.width, size.height
        )


@pytest.mark.parametrize("size", [Size(640, 480), Size(37, 900), Size(1, 1), Size(1200, 1100)])
def test_the_grid_is_the_processors_own(size):
    """The image processor itself, on pixels: its grid of patches is what boxes are mapped by."""
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    pytest.importorskip("torch")
    family = Qwen25VL({"preprocessor": {"max_pixels": 200_704}})
    given = family.target(size)
    pixels = Image.new("RGB", (given.width, given.height))
    processor = theirs.Qwen2VLImageProcessorPil(max_pixels=200_704)
    ((_, rows, columns),) = processor(pixels, return_tensors="np")["image_grid_thw"].tolist()
    image = LoadedImage(pixels, size, "key")
    text = f'{{"bbox_2d": [0, 0, {columns * 14}, {rows * 7}]}}'
    (box,) = family.read(TaskKind.GROUND, text, labels=("it",), image=image).boxes
    assert (box.x2, box.y2) == pytest.approx((size.width, size.height / 2))
    assert family.image_tokens(size) == rows * columns // 4
