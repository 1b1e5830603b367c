"""What every family of the registry promises: boxes come back, and no answer breaks it."""

import ast
import contextlib
import random
import string
import time
from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from tests.families.write_golden import ASKS, GOLDEN, golden
from tests.strategies import mutated, reads_or_fails, seconds_to_read
from tests.tiny_models import CHAT_TEMPLATE
from vlmbatch.errors import ErrorCode, RequestFailed, UsageError
from vlmbatch.families import FAMILIES, entry_named, entry_of, family_for
from vlmbatch.families.base import BOX_TASKS, Family
from vlmbatch.grounding import Box, Size
from vlmbatch.records import IMAGE, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

NAMES = sorted(FAMILIES)


def made(name: str) -> Family:
    return entry_named(name).make({})


def writes(name: str) -> bool:
    """Whether the family has a syntax for boxes."""
    image = LoadedImage(Image.new("L", (28, 28)), Size(28, 28), "key")
    try:
        made(name).write([Box("a", 0, 0, 28, 28)], image=image)
    except ValueError:
        return False
    return True


WITH_BOXES = [name for name in NAMES if writes(name)]


def seen(family: Family, size: Size) -> LoadedImage:
    """An image of this size as the loader hands it over."""
    target = family.target(size)
    pixels = family.prepare(Image.new("L", (target.width, target.height)))
    return LoadedImage(pixels, size, "key")


def step_of(family: Family, size: Size) -> tuple[float, float]:
    """One step of the family's grid in pixels."""
    if hasattr(family, "step"):
        return family.step(size)
    (x, _), (y, _) = family.space.axes(size)
    return x, y


@st.composite
def boxes_in(draw, size: Size, step: tuple[float, float]):
    """A box of at least one step."""
    edges = []
    for limit, least in ((size.width, step[0]), (size.height, step[1])):
        least = min(least, limit)
        low = draw(st.floats(0, limit - least))
        edges.append((low, draw(st.floats(min(low + least, limit), limit))))
    (x1, x2), (y1, y2) = edges
    label = draw(st.sampled_from(["cat", "stop sign", "猫", "white-tailed deer 2"]))
    return Box(label, x1, y1, x2, y2)


@examples(max_examples=1000, deadline=None)
@given(st.data(), st.sampled_from(WITH_BOXES))
def test_boxes_come_back_within_one_step_of_the_grid(data, name):
    entry, family = entry_named(name), made(name)
    size = data.draw(st.builds(Size, st.integers(16, 1500), st.integers(16, 1500)))
    step = step_of(family, size)
    boxes = data.draw(st.lists(boxes_in(size, step), min_size=1, max_size=4))
    image = seen(family, size)
    text = family.write(boxes, image=image)
    kind = TaskKind.DETECT
    if TaskKind.GROUND in entry.tasks and not all(box.label in text for box in boxes):
        kind = TaskKind.GROUND  # there is no place for labels: all are the asked phrase
    if kind not in entry.tasks:
        kind = TaskKind.GROUND
    if kind is TaskKind.GROUND:
        boxes = [Box(boxes[0].label, b.x1, b.y1, b.x2, b.y2) for b in boxes]
        text = family.write(boxes, image=image)
    labels = tuple(dict.fromkeys(box.label for box in boxes))
    found = family.read(kind, text, labels=labels, image=image).boxes
    assert [b.label for b in found] == [b.label for b in boxes]
    for box, back in zip(boxes, found, strict=True):
        assert abs(box.x1 - back.x1) <= step[0] * 1.001
        assert abs(box.x2 - back.x2) <= step[0] * 1.001
        assert abs(box.y1 - back.y1) <= step[1] * 1.001
        assert abs(box.y2 - back.y2) <= step[1] * 1.001


@pytest.mark.parametrize("name", WITH_BOXES)
def test_no_boxes_come_back_as_none(name):
    family, size = made(name), Size(640, 480)
    image = seen(family, size)
    text = family.write([], image=image)
    for kind in BOX_TASKS:
        if kind in entry_named(name).tasks:
            assert family.read(kind, text, labels=("cat",), image=image).boxes == ()


# Traps: numbers that are swapped, outside, doubled, cut off; thoughts, tags, other scripts.

ODD = [
    "There are none.",
    "图中没有猫。",
    "这是一只红色的猫 [[0,0,500,500]]",
    "<think>It is at [[1, 2, 3, 4]]</think>There is no cat.",
    "<think>[0.1, 0.1, 0.2, 0.2] <loc_1><loc_2><loc_3><loc_4>",
    '```json\n[{"bbox_2d": [1, 2, 300, 400], "label": "a"}]\n```',
    '```json\n[{"bbox_2d": [1, 2, 300, 400], "label": "a"}, {"bbox_2d": [1, 2',
    '{"bbox_2d": [[900, 900, 100, 100]], "label": "b"}',
    '{"box_2d": [900.5, -3, 100, 2000]}',
    "[[[[0.1, 0.2, 0.3, 0.4]]]]",
    "[0.9, 0.9, 0.1, 0.1]",
    "[5, 5, 6, 6]",
    "<ref>cat</ref><box>[[1, 2, 999, 1000]]</box>",
    "<ref>cat</ref><box>(1,2),(999,1000)</box><box>(0,0),(1,",
    "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(300,400)<|box_end|>",
    "<box>1 2 300 400</box>",
    "<|ref|>cat<|/ref|><|det|>[[580, 270, 999, 900]]<|/det|>",
    "<|begin_of_box|>[[100,200,300,400]]<|end_of_box|>",
    '<point x="63.5" y="44.6" alt="cat">cat</point>',
    '<points x1="10.2" y1="20.1" x2="30" y2="101" alt="cats">cats</points>',
    "<phrase>cat</phrase><object><patch_index_0863><patch_index_0044></object>",
    "<object><patch_index_9999><patch_index_0044></delimiter_of_multi_objects/>"
    "<patch_index_0000><patch_index_1023>",
    "<0x00>10 20 100 200<0x01><0x00>10 20<0x01><0x00><0x01><0x00>1 2 3 4",
    "\x00\x0110\x00 1 2 3 4 5\x01",
    "<loc0256><loc0128><loc0768><loc0900><seg001> cat ; <loc1023><loc1023><loc0000><loc0000> dog",
    "cat<loc_999><loc_999><loc_0><loc_0><poly><loc_1><loc_2><loc_30><loc_40><loc_5></poly>",
    "<think>" * 30 + "</think>" * 30,
    "[" * 300 + "]" * 300,
    "1" * 400 + "." + "9" * 400,
    "[1e999, nan, -inf, 0x10]",
    '{"bbox_2d": [１, ２, ３００, ４００]}',
    "\ud800 [0, 0, 1, 1]",
    "",
]
BITS = sorted({*ODD, *string.punctuation, "<|im_end|>", "0", "1000", " ", "\n", "</s>", "cat"})


@pytest.mark.parametrize("name", NAMES)
def test_odd_answers_are_read_or_fail_to_parse(name):
    family = made(name)
    for text in ODD:
        reads_or_fails(family, text)


def written(name: str, rng: random.Random, most: int = 4) -> str:
    """An answer with random boxes, as the family would write it."""
    family, size = made(name), Size(30, 20)
    boxes = []
    for _ in range(rng.randint(0, most)):
        x1, y1 = rng.uniform(0, 29), rng.uniform(0, 19)
        boxes.append(Box("cat", x1, y1, rng.uniform(x1 + 0.5, 30), rng.uniform(y1 + 0.5, 20)))
    with contextlib.suppress(ValueError):
        return family.write(boxes, image=seen(family, size))
    return rng.choice(ODD)


ANSWERS = st.builds(
    lambda name, seed: (name, written(name, random.Random(seed))),
    st.sampled_from(NAMES),
    st.integers(0, 10_000),
)


@examples(max_examples=2000, deadline=None)
@given(st.data(), st.sampled_from(NAMES), st.integers(0, 10_000))
def test_whatever_the_text_is_it_is_read_or_fails_to_parse(data, name, seed):
    answer = written(name, random.Random(seed))
    text = data.draw(
        st.text(max_size=200)
        | mutated(st.just(answer))
        | mutated(st.sampled_from(ODD))
        | st.lists(st.sampled_from(BITS), max_size=12).map("".join)
    )
    reads_or_fails(made(name), text)


def broken(text: str, rng: random.Random) -> str:
    """Pieces of it cut out, doubled, moved, or put between others."""
    for _ in range(rng.randint(0, 6)):
        at, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        end = min(end, at + 30)
        match rng.randrange(5):
            case 0:
                text = text[:at] + text[end:]
            case 1:
                text = text[:end] + text[at:]
            case 2:
                text = text[:at] + rng.choice(BITS) + text[end:]
            case 3:
                text = text[:at] + text[at:end] * rng.randint(2, 50) + text[end:]
            case 4:
                text = text[:at]
    return text[:4000]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_100_000_broken_answers_are_read_in_50_ms_each(name):
    rng, family = random.Random(name), made(name)
    for number in range(-(-100_000 // len(NAMES))):
        answer = written(name, rng) if number % 3 else rng.choice(ODD)
        text = broken(answer, rng)
        best = min(_seconds(family, text) for _ in range(1))
        if best > 0.05:  # the garbage collector may have run just then
            best = min(_seconds(family, text) for _ in range(3))
        assert best <= 0.05, text


def _seconds(family: Family, text: str) -> float:
    """Processor time of the slowest kind of task."""
    before = time.process_time()
    reads_or_fails(family, text)
    return (time.process_time() - before) / len(TaskKind)


PIECES = [
    *(text for text in ODD if 0 < len(text) < 300),
    *("a", " ", "\n", "[", "[ ", "(", "<", "</", "<|", "<box>", "<ref>", "<think>", "</think>"),
    *('"', "{", "}", '{"', '"bbox_2d": [', '"bbox_2d": [1,', "\\", "[1,", "[1, 2,", "1", "1 "),
    *("<loc_1>", "<loc_", "<loc0001>", "<patch_index_0001>", "<phrase>", "<phrase>a</phrase>"),
    *("<object>", "<0x00>", "<0x00>1 ", "<poly>", "x1", "<points ", '<point x="', ",", ";"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_long_answer_is_read_in_linear_time(name):
    """The slowest takes about 8 us a character, four times that on a machine that is busy; what is
    quadratic takes a minute."""
    family = made(name)
    slowest = max((seconds_to_read(family, piece, 20_000), piece) for piece in PIECES)
    assert slowest[0] < 3, slowest


# Wording and registry


def test_the_golden_prompts_are_current():
    assert GOLDEN.read_text(encoding="utf-8") == golden(), "run tests.families.write_golden"


@pytest.mark.parametrize("name", NAMES)
def test_every_task_of_a_family_is_worded_and_the_others_are_a_failure(name):
    entry, family = entry_named(name), made(name)
    assert family.name == name
    assert family.version >= 1
    assert set(entry.tasks) <= set(TaskKind) - {TaskKind.TEXT}
    for ask in ASKS.values():
        if ask.kind in entry.tasks:
            prompt = family.word(ask)
            assert (IMAGE in prompt) == family.raw
            assert all(word in prompt for word in (ask.question and ask.labels) or ())
        else:
            with pytest.raises(RequestFailed) as caught:
                family.word(ask)
            assert caught.value.failure.code is ErrorCode.BAD_ROW


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_sizes_and_tokens_are_counted(name):
    family = made(name)
    for size in (Size(1, 1), Size(1, 5000), Size(5000, 1), Size(640, 480), Size(4000, 3000)):
        target = family.target(size)
        assert min(target.width, target.height) >= 1
        tokens = family.image_tokens(size)
        assert tokens is None or 1 <= tokens < 100_000


@pytest.mark.parametrize("name", NAMES)
def test_any_config_makes_a_family(name):
    entry = entry_named(name)
    odd = {"text_config": 3, "vision_config": [1], "image_grid_pinpoints": [1], "size": "x"}
    for config in ({"vision_config": None}, odd, {"preprocessor": None}, {"preprocessor": [2]}):
        entry.matches(config, "x")
        assert entry.make(config).image_tokens(Size(64, 64)) != 0


def test_names_are_unique_and_generic_takes_the_rest():
    assert len(set(FAMILIES)) == len(FAMILIES)
    assert FAMILIES[-1] == "generic"
    assert family_for({"model_type": "no-such"}).name == "generic"


@pytest.mark.parametrize(
    ("config", "model_id", "name"),
    [
        ({"model_type": "llava"}, "llava-hf/llava-1.5-7b-hf", "llava"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "", "pixtral"),
        ({"model_type": "llava", "vision_config": {"model_type": "siglip"}}, "", "generic"),
        ({"model_type": "mistral3"}, "", "pixtral"),
        ({"model_type": "llava_next"}, "", "llava_next"),
        ({"model_type": "llava_onevision"}, "", "llava_onevision"),
        ({"model_type": "deepseek_vl"}, "x/deepseek-vl-1.3b-chat", "deepseek_vl"),
        ({"model_type": "deepseek_vl"}, "/base/deepseek-vl-1.3b-chat", "deepseek_vl"),
        (
            {"model_type": "deepseek_vl_hybrid"},
            "deepseek-community/deepseek-vl-7b-Base",
            "deepseek_vl_base",
        ),
        ({"model_type": "kosmos-2"}, "", "kosmos2"),
        ({"model_type": "fuyu"}, "", "fuyu"),
        ({"model_type": "paligemma"}, "", "paligemma"),
        ({"model_type": "florence2"}, "", "florence2"),
        ({"model_type": "smolvlm"}, "", "idefics3"),
        ({"model_type": "llama4"}, "", "llama4"),
        ({"model_type": "mllama"}, "", "llama3_2_vision"),
        ({"model_type": "aya_vision"}, "", "aya_vision"),
        ({"model_type": "idefics3", "vlmbatch_family": "demo"}, "", "demo"),
    ],
)
def test_the_family_is_decided_by_the_config_and_the_name(config, model_id, name):
    assert entry_of(config, model_id).name == name


def test_another_reading_of_the_boxes_is_chosen_by_name():
    image = LoadedImage(Image.new("L", (4, 4)), Size(200, 100), "key")
    text, ask = "[0.50, 0.50, 1.00, 1.00]", ("cat",)
    padded, squash = family_for({}, "llava"), family_for({}, "llava", box_space="squash")
    (one,) = padded.read(TaskKind.GROUND, text, labels=ask, image=image).boxes
    (other,) = squash.read(TaskKind.GROUND, text, labels=ask, image=image).boxes
    assert one == Box("cat", 100, 50, 200, 100)
    assert other == Box("cat", 100, 50, 200, 100)
    text = "[0.00, 0.25, 1.00, 0.75]"
    (one,) = padded.read(TaskKind.GROUND, text, labels=ask, image=image).boxes
    (other,) = squash.read(TaskKind.GROUND, text, labels=ask, image=image).boxes
    assert one == Box("cat", 0, 0, 200, 100)
    assert other == Box("cat", 0, 25, 200, 75)
    with pytest.raises(UsageError, match="no reading 'square'") as caught:
        family_for({}, "llava", box_space="square")
    assert caught.value.hint == "it has: padded, squash"


def test_words_of_a_family_that_has_no_boxes_ask_for_none():
    with pytest.raises(RequestFailed, match="no words for ground"):
        made("aya_vision").word(Ask(TaskKind.GROUND, question="a", labels=("a",)))


def test_smolvlm_prompts_are_those_of_its_librarys_own_chat_template():
    """The one family whose template transformers ships; the others' are in their checkpoints."""
    source = find_spec("transformers.models.smolvlm").submodule_search_locations[0]
    tree = ast.parse((Path(source) / "processing_smolvlm.py").read_bytes())
    template = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "DEFAULT_CHAT_TEMPLATE"
    )
    text = family_for({"model_type": "smolvlm"}).word(Ask(TaskKind.VQA, question="Why?"))
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    rendered = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
    assert rendered == "<|im_start|>User:<image>Why?<end_of_utterance>\nAssistant:"
    ours = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)
    assert ours == rendered  # what our small checkpoints are asked with
