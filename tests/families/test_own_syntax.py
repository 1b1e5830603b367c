"""Answers as the models' authors show them, in each family's own syntax and space."""

import pytest

from tests.strategies import upright
from vlmbatch.errors import ErrorCode, RequestFailed
from vlmbatch.families import family_for
from vlmbatch.families.cogvlm import CogVLMBase, CogVLMChat, CogVLMGrounding
from vlmbatch.families.deepseek_vl2 import DeepSeekVL2
from vlmbatch.families.gemma import Gemma3, Gemma4
from vlmbatch.families.glm import Glm
from vlmbatch.families.internvl import InternVL
from vlmbatch.families.kimi import Kimi
from vlmbatch.families.minicpm import MiniCPM
from vlmbatch.families.molmo import Molmo, Molmo2
from vlmbatch.families.moondream import Moondream
from vlmbatch.families.phi import Phi4
from vlmbatch.families.yi_vl import YiVL
from vlmbatch.grounding import Box, Point, Size
from vlmbatch.records import IMAGE, TaskKind
from vlmbatch.tasks import Ask

SIZE = Size(2000, 1000)
NINES = Size(1998, 999)
GROUND = Ask(TaskKind.GROUND, question="the cat", labels=("the cat",))
DETECT = Ask(TaskKind.DETECT, labels=("cat", "dog"))


def read(family, text, kind=TaskKind.GROUND, size=SIZE, labels=("the cat",)):
    return family.read(kind, text, labels=labels, image=upright(size))


@pytest.mark.parametrize(
    ("family", "size", "text", "found"),
    [
        (InternVL(), SIZE, "<ref>cat</ref><box>[[253, 231, 733, 787]]</box>", [("cat", 506, 231)]),
        (
            InternVL(),
            SIZE,
            "<ref>cat</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box><ref>dog</ref><box>[[9, 9, 10",
            [("cat", 2, 2), ("cat", 10, 6)],
        ),
        (InternVL(), SIZE, "It is at [253, 231, 733, 787] here.", [("the cat", 506, 231)]),
        (
            InternVL(),
            SIZE,
            "<ref>猫</ref><box>［［733，787，253，231］］</box>",
            [("猫", 506, 231)],
        ),
        (
            InternVL(),
            SIZE,
            "<ref>cat</ref><box>[[253, 231, 733, 787]]</box><|im_end|>",
            [("cat", 506, 231)],
        ),
        (Glm(), SIZE, "<|begin_of_box|>[[100,200,300,400]]<|end_of_box|>", [("the cat", 200, 200)]),
        (
            Glm(),
            SIZE,
            "<think>Is it [[1,2,3,4]]?</think><answer>The cat is at "
            "<|begin_of_box|>(100, 200, 300, 400)<|end_of_box|>.</answer>",
            [("the cat", 200, 200)],
        ),
        (Glm(), SIZE, "<|begin_of_box|><100,200,300,400><|end_of_box|>", [("the cat", 200, 200)]),
        (
            Glm(),
            SIZE,
            "<|begin_of_box|>[[[1,2,3,4],[5,6,7,8]",
            [("the cat", 2, 2), ("the cat", 10, 6)],
        ),
        (
            Kimi(),
            SIZE,
            '◁think▷hm◁/think▷{"bbox_2d": [0.280, 0.500, 0.520, 0.700]}',
            [("the cat", 560, 500)],
        ),
        (
            Gemma4(),
            SIZE,
            '```json\n[{"box_2d": [250, 100, 700, 520], "label": "cat"}]\n```',
            [("cat", 200, 250)],
        ),
        (MiniCPM(), SIZE, "<ref>x</ref><box>253 231 733 787</box>", [("x", 506, 231)]),
        (MiniCPM(), SIZE, "<ref>x</ref><box>253 231 733 787</box><box>1 2 3 4", [("x", 506, 231)]),
        (
            DeepSeekVL2(),
            NINES,
            "<|ref|>The giraffe at the back.<|/ref|><|det|>[[580, 270, 999, 900]]<|/det|>"
            "<｜end▁of▁sentence｜>",
            [("The giraffe at the back.", 1160, 270)],
        ),
        (
            DeepSeekVL2(),
            NINES,
            "<|ref|>cat<|/ref|><|det|>[[0, 0, 999, 999], [1, 2, 3, 4]]<|/det|>",
            [("cat", 0, 0), ("cat", 2, 2)],
        ),
        (CogVLMGrounding(), SIZE, "a dog [[123,045,678,890]]", [("the cat", 246, 45)]),
        (
            CogVLMChat(),
            SIZE,
            "[[100,045,678,890;200,300,400,500]]",
            [("the cat", 200, 45), ("the cat", 400, 300)],
        ),
        (YiVL(), NINES, "It is at [100, 200, 300, 400].\n###", [("the cat", 200, 200)]),
        (YiVL(), NINES, "(100, 200), (300, 400)", [("the cat", 200, 200)]),
        (
            Moondream(),
            SIZE,
            '{"objects": [{"x_min": -0.0147, "y_min": 0.25, "x_max": 0.5, "y_max": 1.01}]}',
            [("the cat", 0, 250)],
        ),
    ],
)
def test_a_shown_answer(family, size, text, found):
    """Label, x1 and y1 in pixels; the corners are sorted, and inside of the image."""
    boxes = read(family, text, size=size).boxes
    assert [box.label for box in boxes] == [label for label, _, _ in found]
    for box, (_, x1, y1) in zip(boxes, found, strict=True):
        assert (box.x1, box.y1) == (pytest.approx(x1), pytest.approx(y1))
        assert 0 <= box.x1 < box.x2 <= size.width
        assert 0 <= box.y1 < box.y2 <= size.height


def test_999_and_1000_are_the_far_edge_of_their_own_families():
    edge = {
        InternVL(): "<box>[[0, 0, 1000, 1000]]</box>",
        MiniCPM(): "<box>0 0 1000 1000</box>",
        Glm(): "<|begin_of_box|>[0,0,1000,1000]<|end_of_box|>",
        DeepSeekVL2(): "<|det|>[[0, 0, 999, 999]]<|/det|>",
        YiVL(): "[0, 0, 999, 999]",
    }
    for family, text in edge.items():
        assert read(family, text).boxes == (Box("the cat", 0, 0, 2000, 1000),)
    assert read(CogVLMChat(), "[[000,000,999,999]]").boxes == (Box("the cat", 0, 0, 1998, 999),)


def test_boxes_outside_of_the_image_are_cut_or_left_out():
    text = "<ref>cat</ref><box>[[-50, 900, 500, 1200], [1001, 0, 1100, 10], [5, 5, 5, 9]]</box>"
    assert read(InternVL(), text).boxes == (Box("cat", 0, 900, 1000, 1000),)


@pytest.mark.parametrize(
    ("family", "text", "said"),
    [
        (InternVL(), "A <ref>cat</ref><box>[[1, 2, 3, 4]]</box> sits.", "A cat sits."),
        (MiniCPM(), "<ref>x</ref><box>253 231 733 787</box>", "x"),
        (MiniCPM(), "<box>253 231 733 787</box>", "<box>253 231 733 787</box>"),
        (DeepSeekVL2(), "<|ref|>cat<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|> there", "cat there"),
        (Glm(), "<think>so</think>It is <|begin_of_box|>42<|end_of_box|>", "It is 42"),
        (Glm(), "<|begin_of_box|>1, 2, 3, 4<|end_of_box|>", "1, 2, 3, 4"),
        (
            CogVLMChat(),
            "a dog [[123,045,678,890;1,2,3,4]] on [[the]] sofa",
            "a dog on [[the]] sofa",
        ),
        (
            Molmo(),
            'Counting the <points x1="1" y1="2" x2="3" y2="4" alt="cats">cats</points> '
            "shows a total of 2.",
            "Counting the cats shows a total of 2.",
        ),
        (YiVL(), "A cat.\n### Human: and", "A cat."),
        (Kimi(), "◁think▷hm◁/think▷A cat.", "A cat."),
        (Gemma3(), "A cat.<end_of_turn>", "A cat."),
    ],
)
def test_texts_lose_the_tags_and_keep_what_stands_in_them(family, text, said):
    for kind in (TaskKind.CAPTION, TaskKind.VQA, TaskKind.OCR):
        assert read(family, text, kind).text == said


def test_molmo_points_in_percent():
    one = ' <point x="63.5" y="44.6" alt="dogs">dogs</point>'
    assert read(Molmo(), one, TaskKind.DETECT).points == (Point("the cat", 1270, 446),)
    assert read(Molmo(), one, TaskKind.DETECT, labels=("a", "b")).points[0].label == "dogs"
    many = '<points x1="10" y1="20" x2="101" y2="5" x3="30" y3="4" alt="it\'s"> x</points>'
    found = read(Molmo2(), many, TaskKind.DETECT, labels=("a", "b")).points
    assert found == (Point("it's", 200, 200), Point("it's", 600, 40))
    cut = '<points x1="10" y1="20" x2="30" y2="4'
    assert read(Molmo(), cut).points == (Point("the cat", 200, 200),)
    assert read(Molmo(), "There are none.").boxes == ()
    with pytest.raises(ValueError, match="no syntax for boxes"):
        Molmo().write([], image=upright(SIZE))


@pytest.mark.parametrize("family", [Molmo(), Molmo2()])
def test_molmo_points_come_back(family):
    points = [Point("cat", 200, 300), Point("dog", 500, 500), Point("cat", 20, 30)]
    text = family.write_points(points, image=upright(SIZE))
    back = read(family, text, TaskKind.DETECT, labels=("cat", "dog")).points
    assert back == (points[0], points[2], points[1])


def test_other_points():
    assert read(MiniCPM(), "<ref>a</ref><point>500 250</point>").points == (Point("a", 1000, 250),)
    assert read(Moondream(), '[{"x": 0.5, "y": 0.25}]').points == (Point("the cat", 1000, 250),)
    assert read(Moondream(), '{"objects": []}').boxes == ()


@pytest.mark.parametrize(
    "family", [InternVL(), Glm(), Kimi(), Gemma4(), MiniCPM(), DeepSeekVL2(), Molmo(), YiVL()]
)
def test_an_answer_without_a_place_fails(family):
    for text in ("", "A cat.", "<box>12 34", "[1, 2, 3"):
        with pytest.raises(RequestFailed) as caught:
            read(family, text)
        assert caught.value.failure.code is ErrorCode.PARSE_FAILED


def test_documented_words():
    describes = "Please provide the bounding box coordinate of the region this sentence describes:"
    assert InternVL().word(GROUND) == f"{describes} <ref>the cat</ref>"
    assert MiniCPM().word(GROUND) == f"{describes} <ref>the cat</ref>"
    assert DeepSeekVL2().word(GROUND) == "<|ref|>the cat<|/ref|>."
    assert DeepSeekVL2().word(DETECT).startswith("<|grounding|>")
    assert Molmo().word(GROUND) == f"{IMAGE} User: Point to the cat. Assistant:"
    where = "Where is the cat? answer in [[x0,y0,x1,y1]] format."
    assert CogVLMGrounding().word(GROUND) == f"{IMAGE}{where}"
    assert CogVLMChat().word(GROUND) == f"{IMAGE}Question: {where} Answer:"
    vqa = Ask(TaskKind.VQA, question="Why?")
    assert CogVLMBase().word(vqa) == f"{IMAGE}Question: Why? Short answer:"
    prompt = YiVL().word(vqa)
    assert prompt.endswith(f"和礼貌的回答。\n\n### Human: {IMAGE}\nWhy?\n### Assistant:")
    assert Moondream().word(Ask(TaskKind.CAPTION)) == "caption short"


@pytest.mark.parametrize("family", [Gemma3(), Phi4(), CogVLMBase()])
def test_families_without_boxes_say_so(family):
    with pytest.raises(RequestFailed, match="no words for ground"):
        family.word(GROUND)
    with pytest.raises(ValueError, match="no syntax for boxes"):
        family.write([], image=upright(SIZE))
    with pytest.raises(RequestFailed, match="has no boxes"):
        read(family, "[[1, 2, 3, 4]]")


@pytest.mark.parametrize(
    ("config", "model", "name"),
    [
        ({"model_type": "internvl_chat"}, "", "internvl"),
        ({"model_type": "internvl"}, "", "internvl"),
        ({"model_type": "glm4v_moe"}, "", "glm4v"),
        ({"model_type": "glm46v"}, "", "glm4v"),
        ({"model_type": "chatglm", "vision_config": {}}, "", "glm_4v_9b"),
        ({"model_type": "chatglm"}, "", "generic"),
        ({"model_type": "kimi_vl"}, "", "kimi_vl"),
        ({"model_type": "gemma3"}, "", "gemma3"),
        ({"model_type": "gemma3n"}, "", "gemma3n"),
        ({"model_type": "gemma4_unified"}, "", "gemma4"),
        ({"model_type": "minicpmv"}, "", "minicpmv"),
        ({"model_type": "minicpmv4_7"}, "", "minicpmv4_6"),
        ({"model_type": "deepseek_vl_v2"}, "deepseek-ai/deepseek-vl2", "deepseek_vl2"),
        (
            {"model_type": "deepseek_vl_v2", "architectures": ["DeepseekOCRForCausalLM"]},
            "",
            "deepseek_ocr",
        ),
        ({"model_type": "phi3_v"}, "", "phi3_v"),
        ({"model_type": "phi4mm"}, "", "phi4_multimodal"),
        ({"model_type": "molmo"}, "", "molmo"),
        ({"model_type": "molmo2"}, "", "molmo2"),
        ({"model_type": "moondream1"}, "", "moondream"),
        ({"model_type": "moondream3"}, "", "moondream"),
        ({"architectures": ["CogVLMForCausalLM"]}, "THUDM/cogvlm-chat-hf", "cogvlm_chat"),
        ({"architectures": ["CogVLMForCausalLM"]}, "THUDM/cogvlm-base-224-hf", "cogvlm_base"),
        (
            {"architectures": ["CogVLMForCausalLM"]},
            "THUDM/cogvlm-grounding-base-hf",
            "cogvlm_grounding",
        ),
        ({"model_type": "llava"}, "01-ai/Yi-VL-6B", "yi_vl"),
    ],
)
def test_the_family_is_told_by_the_config(config, model, name):
    assert family_for(config, model_id=model).name == name
