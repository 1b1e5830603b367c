"""KOSMOS-2, Fuyu, PaliGemma and Florence-2: the exact numbers of their own conventions."""

import pytest
from PIL import Image

from tests.strategies import upright
from vlmbatch.errors import RequestFailed
from vlmbatch.families import family_for
from vlmbatch.families.fuyu import Fuyu
from vlmbatch.grounding import Box, Size
from vlmbatch.records import TaskKind
from vlmbatch.tasks import Ask

SQUARE = Size(1000, 1000)


def read(name: str, kind: TaskKind, text: str, size: Size = SQUARE, *labels: str):
    return family_for({}, name).read(kind, text, labels=labels, image=upright(size))


# KOSMOS-2

SNOWMAN = (
    "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044>"
    "<patch_index_0863></object> warming himself by<phrase> a fire</phrase><object>"
    "<patch_index_0005><patch_index_0911></object>."
)


def test_kosmos2_reads_the_documented_example():
    found = read("kosmos2", TaskKind.GROUND, SNOWMAN, SQUARE, "x").boxes
    assert found == (
        Box("a snowman", 390.625, 46.875, 984.375, 828.125),
        Box("a fire", 171.875, 15.625, 484.375, 890.625),
    )
    text = read("kosmos2", TaskKind.CAPTION, SNOWMAN).text
    assert text == "An image of a snowman warming himself by a fire."


def test_kosmos2_gives_the_boxes_of_the_phrase_in_the_prompt_and_no_others():
    text = (
        "<object><patch_index_0000><patch_index_0000></delimiter_of_multi_objects/>"
        "<patch_index_0033><patch_index_1023></object> near<phrase> a fire</phrase><object>"
        "<patch_index_0005><patch_index_0911></object>"
    )
    found = read("kosmos2", TaskKind.GROUND, text, Size(320, 640), "a dog").boxes
    assert found == (Box("a dog", 0, 0, 10, 20), Box("a dog", 15, 30, 315, 630))


def test_kosmos2_keeps_what_is_whole_of_an_answer_that_was_cut_off():
    text = "<object><patch_index_0000><patch_index_1023></delimiter_of_multi_objects/><patch_ind"
    assert read("kosmos2", TaskKind.GROUND, text, SQUARE, "x").boxes == (
        Box("x", 15.625, 15.625, 984.375, 984.375),
    )
    outside = "<object><patch_index_0000><patch_index_1024></object>"
    with pytest.raises(RequestFailed, match="no box"):
        read("kosmos2", TaskKind.GROUND, outside, SQUARE, "x")


# Fuyu


def test_fuyu_has_y_before_x_and_counts_half_pixels():
    assert read("fuyu", TaskKind.GROUND, "<0x00>10 20 100 200<0x01>", SQUARE, "x").boxes == (
        Box("x", 40, 20, 400, 200),
    )
    (box,) = read("fuyu", TaskKind.GROUND, "\x0010, 20, 100, 200\x01", Size(3840, 2160), "x").boxes
    assert box == Box("x", 80, 40, 800, 400)


def test_fuyu_is_read_from_its_tokens():
    tokens = ["▁a", "▁sign", "<0x00>", "10", "20", "100", "200", "<0x01>", "▁here", "<0x04>"]
    text = Fuyu.text_of(tokens)
    assert text == " a sign<0x00> 10 20 100 200<0x01> here"
    assert read("fuyu", TaskKind.GROUND, text, SQUARE, "x").boxes == (Box("x", 40, 20, 400, 200),)
    assert read("fuyu", TaskKind.VQA, text).text == "a sign here"
    assert Fuyu.text_of(["▁5", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>", "<0xFF>"]) == " 5€\n\ufffd"


@pytest.mark.parametrize(
    "text",
    [
        "\x001020100200\x01",  # the numbers run together: nobody knows where one ends
        "<0x00>10 20 100<0x01>",
        "<0x00>10 20 100 200 300<0x01>",
        "<0x00>10 20 100 200",
        "<0x01><0x00>",
    ],
)
def test_a_malformed_box_of_fuyu_is_no_box(text):
    with pytest.raises(RequestFailed, match="no box"):
        read("fuyu", TaskKind.GROUND, text, SQUARE, "x")


# PaliGemma


def test_paligemma_has_y_before_x_and_1024_bins():
    text = (
        "<loc0256><loc0128><loc0768><loc0900> cat ; <loc0000><loc0000><loc1023><loc1023> stop sign"
    )
    found = read("paligemma", TaskKind.DETECT, text, Size(1023, 1023)).boxes
    assert found == (Box("cat", 128, 256, 900, 768), Box("stop sign", 0, 0, 1023, 1023))
    segment = "<loc0256><loc0128><loc0768><loc0900>" + "".join(f"<seg{i:03}>" for i in range(16))
    assert read("paligemma", TaskKind.DETECT, segment + " cat<eos>", Size(1023, 1023)).boxes == (
        Box("cat", 128, 256, 900, 768),
    )
    assert read("paligemma", TaskKind.CAPTION, text + "\n").text == "cat ;  stop sign"


# Florence-2


def test_florence2_has_the_centres_of_1000_bins():
    text = "</s><s>cat<loc_100><loc_200><loc_500><loc_999><loc_0><loc_0><loc_1><loc_1>dog<loc_1>"
    found = read("florence2", TaskKind.DETECT, text + "</s>", Size(500, 1000)).boxes
    assert [(b.label, b.x1, b.y1, b.x2, b.y2) for b in found] == [
        ("cat", pytest.approx(50.25), pytest.approx(200.5), pytest.approx(250.25), 999.5),
        ("cat", 0.25, 0.5, 0.75, 1.5),
    ]


def test_florence2_keeps_the_box_around_corners_and_points():
    text = "Sign<loc_9><loc_9><loc_19><loc_10><loc_18><loc_29><loc_8><loc_28>\n"
    answer = read("florence2", TaskKind.OCR, f"<s>{text}two words{text[4:]}</s>")
    assert answer.text == "Sign\ntwo words"
    assert answer.boxes == (
        Box("Sign", 8.5, 9.5, 19.5, 29.5),
        Box("two words", 8.5, 9.5, 19.5, 29.5),
    )
    text = "cat<poly><loc_1><loc_5><loc_9><loc_2><loc_4><loc_8></poly><poly><loc_1><loc_1></poly>"
    assert read("florence2", TaskKind.DETECT, text).boxes == (Box("cat", 1.5, 2.5, 9.5, 8.5),)
    assert read("florence2", TaskKind.DETECT, "</s><s></s>").boxes == ()
    assert read("florence2", TaskKind.CAPTION, "</s><s>a cat<loc_1></s>").text == "a cat"


# LLaVA


def test_llava_pads_the_picture_to_a_square_and_finds_its_boxes_in_it():
    family = family_for({}, "llava")
    size = Size(800, 400)
    target = family.target(size)
    assert target == Size(336, 168)
    white = Image.new("RGB", (target.width, target.height), "white")
    square = family.prepare(white)
    assert square.size == (336, 336)
    assert square.getpixel((0, 83)) == square.getpixel((0, 252)) == (122, 116, 104)
    assert square.getpixel((0, 84)) == square.getpixel((335, 251)) == (255, 255, 255)
    text = "The box is [0.00, 0.25, 0.50, 0.75]."
    (box,) = family.read(TaskKind.GROUND, text, labels=("x",), image=upright(size)).boxes
    assert box == Box("x", 0, 0, 400, 400)
    assert family.prepare(square) is square


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_llava_answers_of_another_convention_are_no_boxes(name):
    with pytest.raises(RequestFailed, match="no box"):
        read(name, TaskKind.GROUND, "[120, 40, 300, 200]", SQUARE, "x")
    assert read(name, TaskKind.GROUND, "[.9,0.9, 0.1,.1]", SQUARE, "x").boxes == (
        Box("x", pytest.approx(100), pytest.approx(100), pytest.approx(900), pytest.approx(900)),
    )


@pytest.mark.parametrize(
    ("text_config", "start"),
    [
        ({"model_type": "llama"}, "A chat between a curious human"),
        ({"model_type": "mistral"}, "[INST] "),
        ({"model_type": "llama", "hidden_size": 7168}, "<|im_start|>system\nAnswer the questions."),
        ({"model_type": "qwen2"}, "<|im_start|>user "),
    ],
)
def test_llava_next_is_framed_as_its_language_model_was_trained(text_config, start):
    family = family_for({"model_type": "llava_next", "text_config": text_config})
    assert family.frame.startswith(start)
    assert family.frame.count("{text}") == 1


# Costs, as reference figures: width x height


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("llava", 576, 576),
        ("llava_next", 2340, 1948),
        ("deepseek_vl", 576, 576),
        ("kosmos2", 66, 66),
        ("fuyu", 16 * 23 + 1, 2341),
        ("idefics3", 3 * (66 * 4 + 1) + 67, 3 * (66 * 4 + 1) + 67),
        ("paligemma", 256, 256),
        ("florence2", 577, 577),
        ("llama3_2_vision", 1, 1),
    ],
)
def test_image_tokens_are_those_of_the_reference(name, small, large):
    family = family_for({}, name)
    assert family.image_tokens(Size(640, 480)) == small
    assert family.image_tokens(Size(1920, 1080)) == large


def test_image_tokens_follow_the_config():
    tokens = {
        side: family_for({"vision_config": {"image_size": side}}, "paligemma").image_tokens(SQUARE)
        for side in (224, 448, 896)
    }
    assert tokens == {224: 256, 448: 1024, 896: 4096}
    assert family_for({}, "llava_next").image_tokens(Size(336, 336)) == 1176
    assert family_for({}, "llava_next").image_tokens(Size(600, 600)) == 2928


# Thoughts and tags in texts


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<think>hm [1, 2]</think>\n\nred<|im_end|>", "red"),
        ("hm</think> red", "red"),
        ("red<think>was it", "red"),
        ("红色<｜end▁of▁sentence｜>", "红色"),
    ],
)
def test_thoughts_are_no_part_of_a_text(text, plain):
    for name in ("generic", "llava", "deepseek_vl", "pixtral"):
        assert read(name, TaskKind.VQA, text).text == plain


def test_words_that_only_hold_a_thought_are_no_answer():
    with pytest.raises(RequestFailed, match="answered nothing"):
        read("generic", TaskKind.VQA, "<think>it is red")
    with pytest.raises(RequestFailed, match="no box"):
        read("generic", TaskKind.GROUND, '<think>"bbox_2d": [1, 2, 3, 4]', SQUARE, "x")


def test_asked_labels_are_in_one_prompt():
    word = family_for({}, "paligemma").word
    assert word(Ask(TaskKind.DETECT, labels=("cat", "dog"))).endswith("detect cat ; dog")
