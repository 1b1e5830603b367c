"""A row and the run's tasks give the row's requests, in order; what cannot be asked says why."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from vlmbatch.errors import ErrorCode, Failure, Stage, UsageError
from vlmbatch.families import FAMILIES, family_for
from vlmbatch.job import BUILT_IN_TASKS, TaskSpec
from vlmbatch.records import ImageRef, Request, Row, Sampling, TaskKind
from vlmbatch.tasks import MAX_PROMPT_CHARS, Ask, make_task, requests_of


class Plain:
    """Words an ask so that a test sees all of it."""

    stop = ("Next:",)

    def word(self, ask: Ask) -> str:
        return f"{ask.kind}|{ask.style}|{ask.question}|{','.join(ask.labels)}"


def row(images: int = 1, problem: str | None = None, **fields: Any) -> Row:
    refs = tuple(ImageRef(uri=f"{i}.png") for i in range(images))
    return Row(5, "id5", refs, fields, problem)


def planned(row: Row, *specs: TaskSpec | str) -> list[tuple[Request, Failure | None]]:
    tasks = [make_task(TaskSpec(name=s) if isinstance(s, str) else s) for s in specs]
    found = requests_of(row, tasks, Plain(), system="be brief", sampling=Sampling(seed=3))
    pairs = [(item, item.problem) for item in found]
    assert [request.request for request, _ in pairs] == list(range(len(pairs)))
    assert all(r.row == 5 and r.sample == 0 for r, _ in pairs)
    assert all(r.system == "be brief" and r.sampling.seed == 3 for r, _ in pairs)
    return pairs


def prompts(row: Row, *specs: TaskSpec | str) -> list[str]:
    pairs = planned(row, *specs)
    assert [failure for _, failure in pairs] == [None] * len(pairs)
    return [request.prompt for request, _ in pairs]


def problem(row: Row, *specs: TaskSpec | str) -> Failure:
    ((_, failure),) = planned(row, *specs)
    assert failure is not None
    assert not failure.retryable
    return failure


def test_captions_and_ocr_ask_nothing_of_their_own():
    ((caption, _), (ocr, _)) = planned(row(), "caption", "ocr")
    assert (caption.prompt, caption.question) == ("caption|short|None|", None)
    assert (ocr.prompt, ocr.question) == ("ocr|short|None|", None)
    assert prompts(row(), TaskSpec(name="caption", style="detailed")) == ["caption|detailed|None|"]


def test_an_answer_to_the_familys_own_words_ends_where_it_begins_another_turn():
    tasks = [make_task(TaskSpec(name="caption")), make_task(TaskSpec(name="own", prompt="Go."))]
    for stop, expected in (((), ("Next:",)), (("a", "Next:"), ("a", "Next:"))):
        sampling = Sampling(seed=3, stop=stop)
        caption, again, own, _ = requests_of(
            row(), tasks, Plain(), system=None, sampling=sampling, num_samples=2
        )
        assert caption.sampling.stop == again.sampling.stop == expected
        assert own.sampling == sampling
        assert (caption.sampling.seed, again.sampling.seed) == (3, 4)


def test_two_families_end_answers_by_a_text():
    stops = {name: family_for({}, name).stop for name in FAMILIES}
    assert {name: stop for name, stop in stops.items() if stop} == {
        "yi_vl": ("###",),
        "deepseek_vl": ("User:",),
    }


def test_each_question_of_a_row_is_a_request():
    assert prompts(row(question="a?"), "vqa") == ["vqa|short|a?|"]
    assert prompts(row(questions=["a?", "b?"]), "vqa") == ["vqa|short|a?|", "vqa|short|b?|"]
    assert [r.question for r, _ in planned(row(question=["a?", "b?"]), "vqa")] == ["a?", "b?"]


def test_of_question_and_questions_the_one_that_is_there_is_asked():
    assert prompts(row(questions=["b?"], question="a?"), "vqa") == ["vqa|short|b?|"]
    assert prompts(row(questions=None, question="a?"), "vqa") == ["vqa|short|a?|"]


def test_a_null_question_fails_alone():
    (_, first), (asked, second) = planned(row(questions=[None, "b?"]), "vqa")
    assert (first.code, first.stage) == (ErrorCode.BAD_ROW, Stage.ROW)
    assert (asked.question, second) == ("b?", None)
    assert problem(row(question=None), "vqa").message == "the question is null or empty"
    assert problem(row(question=""), "vqa").code is ErrorCode.BAD_ROW


def test_an_empty_list_of_questions_asks_nothing():
    assert planned(row(questions=[]), "vqa") == []
    assert prompts(row(questions=[]), "vqa", "ocr") == ["ocr|short|None|"]


def test_ground_and_detect_say_what_to_look_for():
    ((ground, _),) = planned(row(phrase="the red dot"), "ground")
    assert (ground.question, ground.labels) == ("the red dot", ("the red dot",))
    ((detect, _),) = planned(row(labels=["cät", "dog"]), "detect")
    assert (detect.question, detect.labels) == ('["cät", "dog"]', ("cät", "dog"))
    assert detect.prompt == "detect|short|" + '["cät", "dog"]' + "|cät,dog"


@pytest.mark.parametrize(
    "labels", [["cat", "dog"], "cat,dog", " cat , dog ,", ["cat", None, "dog", ""]]
)
def test_labels_come_from_a_list_or_a_text_with_commas(labels):
    ((detect, failure),) = planned(row(labels=labels), "detect")
    assert (detect.labels, failure) == (("cat", "dog"), None)


@pytest.mark.parametrize("labels", [None, [], "", " , ", [None]])
def test_without_labels_there_is_nothing_to_detect(labels):
    assert problem(row(labels=labels), "detect").message == "there are no labels"


def test_a_null_phrase_is_a_bad_row():
    assert problem(row(phrase=None), "ground").message == "the phrase is null or empty"
    assert len(planned(row(phrase=["a", "b"]), "ground")) == 2


def test_boxes_need_one_image():
    both = planned(row(images=2, phrase="a", labels=["a"]), "ground", "detect")
    assert [failure.code for _, failure in both] == [ErrorCode.BAD_ROW] * 2
    assert both[0][1].message == "boxes need one image, this row has 2"
    assert prompts(row(images=2), "caption") == ["caption|short|None|"]


def test_options_stand_for_columns_and_win_over_them():
    assert prompts(row(), TaskSpec(name="vqa", question="all?")) == ["vqa|short|all?|"]
    assert prompts(row(question="x"), TaskSpec(name="vqa", question="all?")) == ["vqa|short|all?|"]
    assert prompts(row(), TaskSpec(name="ground", phrase="dot")) == ["ground|short|dot|dot"]
    ((detect, _),) = planned(row(), TaskSpec(name="detect", labels=["a", "b"]))
    assert detect.labels == ("a", "b")


def test_numbers_go_on_over_tasks():
    everything = row(questions=["a", "b"], phrase="p", labels="l")
    found = planned(everything, "vqa", "caption", "ground", "detect", "ocr")
    assert [r.task for r, _ in found] == ["vqa", "vqa", "caption", "ground", "detect", "ocr"]


def test_a_row_with_a_problem_fails_once_per_task():
    found = planned(row(problem="the image is null", questions=["a", "b"]), "vqa", "ocr")
    assert [failure.message for _, failure in found] == ["the image is null"] * 2
    assert all(failure.code is ErrorCode.BAD_ROW for _, failure in found)


def test_a_template_words_a_task_over_the_rows_fields():
    spec = TaskSpec(name="alt", prompt="Row {{ row }} ({{ id }}) from {{ shop }}: alt text?")
    ((request, _),) = planned(row(shop="Köln"), spec)
    assert request.prompt == request.question == "Row 5 (id5) from Köln: alt text?"
    assert request.kind is TaskKind.TEXT
    assert make_task(spec).variables == {"row", "id", "shop"}


def test_a_template_of_a_built_in_task_sees_what_is_asked():
    fields = row(questions=["a?", "b?"], phrase="dot", labels="x,y")
    assert prompts(
        fields,
        TaskSpec(name="vqa", prompt="Q: {{ question }}"),
        TaskSpec(name="ground", prompt="Where is {{ phrase }}?"),
        TaskSpec(name="detect", prompt="{{ labels | join(' and ') }}"),
    ) == ["Q: a?", "Q: b?", "Where is dot?", "x and y"]
    assert make_task(TaskSpec(name="vqa", prompt="{{ question }}")).kind is TaskKind.VQA


def test_a_vqa_template_needs_no_question_column():
    assert prompts(row(), TaskSpec(name="vqa", prompt="Is it day?")) == ["Is it day?"]
    spec = TaskSpec(name="vqa", prompt="Q: {{ question }}")
    assert problem(row(question=None), spec).message == "the question is null or empty"


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing }}",
        "{{ shop.nothing.at.all }}",
        "{{ 1 // 0 }}",
        "{{ shop + 3 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ shop.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ tags.append('x') }}",
        "{% include 'other' %}",
    ],
)
def test_a_template_that_fails_or_leaves_its_sandbox_fails_the_row(template):
    failure = problem(row(shop="s", tags=["a"]), TaskSpec(name="mine", prompt=template))
    assert (failure.code, failure.stage) == (ErrorCode.BAD_ROW, Stage.PROMPT)
    assert failure.message.startswith("the prompt of task 'mine' does not fit this row: ")


def test_fields_are_data_and_never_templates():
    text = "{{ 7 * 7 }} {% raw %} <b>&"
    assert prompts(row(shop=text), TaskSpec(name="mine", prompt="{{ shop }}")) == [text]


def test_a_prompt_beyond_all_measure_fails():
    spec = TaskSpec(name="mine", prompt="{{ 'ab' * n }}")
    assert problem(row(n=MAX_PROMPT_CHARS), spec).code is ErrorCode.PROMPT_TOO_LONG
    assert len(prompts(row(n=MAX_PROMPT_CHARS // 2), spec)[0]) == MAX_PROMPT_CHARS


def test_a_task_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UsageError) as caught:
        make_task(TaskSpec(name="captoin"))
    assert caught.value.message == "unknown task 'captoin'"
    assert all(name in caught.value.hint for name in BUILT_IN_TASKS)


def test_a_template_that_is_none_is_refused():
    with pytest.raises(UsageError, match="the prompt of task 'mine' is not a template"):
        make_task(TaskSpec(name="mine", prompt="{{ open"))


def test_each_sample_of_a_request_has_a_seed_of_its_own():
    tasks = [make_task(TaskSpec(name=name)) for name in ("vqa", "ocr")]

    def asked(seed: int | None) -> list[tuple[int, int, int | None]]:
        sampling = Sampling(temperature=1.0, seed=seed)
        given = row(questions=["a?", None])
        found = requests_of(given, tasks, Plain(), system=None, sampling=sampling, num_samples=2)
        assert [item.problem is None for item in found] == [True] * 2 + [False] * 2 + [True] * 2
        return [(item.request, item.sample, item.sampling.seed) for item in found]

    keys = [(request, sample) for request in range(3) for sample in range(2)]
    assert asked(7) == [(*key, 7 + key[1]) for key in keys]
    assert asked(None) == [(*key, None) for key in keys]


TEXTS = st.none() | st.text(max_size=8)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "question": TEXTS | st.lists(TEXTS, max_size=3),
        "questions": TEXTS | st.lists(TEXTS, max_size=3),
        "phrase": TEXTS | st.lists(TEXTS, max_size=3),
        "labels": TEXTS | st.lists(TEXTS, max_size=3),
    },
)


@examples(max_examples=200)
@given(
    FIELDS,
    st.integers(0, 3),
    st.lists(st.sampled_from(BUILT_IN_TASKS), min_size=1, unique=True),
    st.sampled_from(FAMILIES),
)
def test_any_row_can_be_planned_for_any_family(fields, images, names, family):
    tasks = [make_task(TaskSpec(name=name)) for name in names]
    refs = tuple(ImageRef(uri="a.png") for _ in range(images))
    wording = family_for({}, family)
    found = requests_of(
        Row(5, "id5", refs, fields), tasks, wording, system=None, sampling=Sampling()
    )
    requests = found
    assert [r.request for r in requests] == list(range(len(requests)))
    assert [r.task for r in requests] == sorted((r.task for r in requests), key=names.index)
    for item in found:
        assert item.problem or item.prompt
    unasked = set(names) - {r.task for r in requests}
    assert unasked <= {"vqa", "ground"}  # only an empty list asks nothing
