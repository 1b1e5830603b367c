"""``vlmbatch quality`` on real outputs: figures counted by hand, gates, words."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness import OURS, echo, parts, picture, read_results, shards, vlmbatch, write_manifest

CAPTIONS = [
    *["A cat on a sofa."] * 3,
    "a cat  on a sofa",  # the same but for case, spaces and the full stop
    "I'm sorry, but I can't help with that.",
    "Sure! Here is a caption: a dog runs",
    "The image shows a red car on a street.",
    "a red car " * 9,
    "Собака бежит по зелёному лугу.",
    "Two boats on a lake at dawn.",
]
ANSWERS = ["yes", "Yes.", "no", "yes", "YES", "no", "maybe", "yes", "no", "yes"]
WHOLE, TINY = "[0, 0, 1000, 1000]", "[10, 10, 15, 15]"
BOXES = [
    f'[{{"bbox_2d": {WHOLE}, "label": "cat"}}, {{"bbox_2d": [1, 1, 1000, 1000], "label": "cat"}}]',
    f'[{{"bbox_2d": {TINY}, "label": "Dog"}}]',
    "[]",
    "nothing like a box",
    *['[{"bbox_2d": [100, 100, 400, 700], "label": "cat"}]'] * 6,
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows, three tasks; the last boxes have failed."""
    folder = tmp_path_factory.mktemp("quality")
    replies = [list(reply) for reply in zip(CAPTIONS, ANSWERS, BOXES, strict=True)]
    names = [f"{row}.png" for row in range(10)]
    for name in names:
        (folder / name).write_bytes(picture(400, 200))
    columns = {"image": names, "id": [f"id-{row}" for row in range(10)], "reply": replies}
    manifest = write_manifest(folder / "m.parquet", {**columns, "question": ["is it?"] * 10})
    run = vlmbatch(
        *("run", manifest, "-t", "caption", "-t", "vqa", "-t", "detect"),
        *("--labels", "cat,dog,bird", *echo(reply_from="reply"), "-o", folder / "out"),
        *("--part-rows", "4", "--max-failure-rate", "1"),
    )
    assert run.exit_code == 0, run
    return folder / "out"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def found(finished: Path) -> dict[str, Any]:
    done = vlmbatch("quality", finished, "--json")
    assert done.exit_code == 0, done
    return done.json


def test_captions(found: dict[str, Any]) -> None:
    metrics = found["tasks"]["caption"]["metrics"]
    expected = {
        "failed": 0,
        "truncated": 0,
        "empty": 0,
        "repeated": 0.4,
        "repeated.most": 0.4,
        "refusals": 0.1,
        "preambles": 0.2,
        "preambles.chatter": 0.1,
        "preambles.about_image": 0.1,
        "loops": 0.1,
        "script.latin": 0.9,
        "script.cyrillic": 0.1,
        "other_script": 0.1,
        "words_median": 5,
        "words_p95": 27,
        "chars_p5": 16,
    }
    assert {name: metrics[name] for name in expected} == expected
    findings = found["tasks"]["caption"]["findings"]
    first = {"row": 0, "id": "id-0", "text": "4 times: A cat on a sofa."}
    assert findings["repeated"] == {"count": 4, "of": 10, "examples": [first]}
    assert findings["loops"]["examples"] == [{"row": 7, "id": "id-7", "text": "'a red car' x 9"}]
    assert [e["row"] for e in findings["preambles"]["examples"]] == [5, 6]
    words = found["tasks"]["caption"]["details"]["words"]
    assert sum(words["counts"]) == 10


def test_answers_to_questions_may_be_alike_and_are_counted(found: dict[str, Any]) -> None:
    task = found["tasks"]["vqa"]
    assert "repeated" not in task["metrics"]
    assert task["details"]["labels"] == {"most": {"yes": 6, "no": 3, "maybe": 1}}
    assert task["metrics"]["labels"] == 3
    assert task["metrics"]["top_label"] == 0.6
    assert task["metrics"]["evenness"] == pytest.approx(0.817, abs=0.001)


def test_boxes(found: dict[str, Any]) -> None:
    task = found["tasks"]["detect"]
    expected = {
        "failed": 0.1,
        "failed.parse_failed": 0.1,
        "empty": 1 / 9,
        "boxes_tiny": 1 / 9,
        "boxes_whole": 2 / 9,
        "boxes_twice": 1 / 9,
        "boxes_per_answer": 1,
        "boxes_most": 2,
        "labels": 2,
        "top_label": 8 / 9,
        "labels_unseen": 1,
    }
    assert {name: task["metrics"][name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert task["details"]["labels"] == {"most": {"cat": 8, "dog": 1}, "unseen": ["bird"]}
    assert task["details"]["boxes_per_answer"] == {"0": 1, "1": 7, "2": 1}
    assert [e["row"] for e in task["findings"]["boxes_whole"]["examples"]] == [0]
    assert task["findings"]["failed"]["examples"][0]["row"] == 3


def test_what_was_found_is_kept_in_the_output_and_no_reader_minds(
    finished: Path, found: dict[str, Any]
) -> None:
    kept = json.loads((finished / OURS / "quality.json").read_text())
    assert {**kept, "seconds": 0, "measured": ""} == {**found, "seconds": 0, "measured": ""}
    assert kept["run"] == json.loads((finished / OURS / "run.json").read_text())["run"]
    assert pq.read_table(finished).num_rows == 30


def test_the_text_names_rows(finished: Path) -> None:
    done = vlmbatch("quality", finished)
    assert done.exit_code == 0, done
    assert "row 4 (id-4): I'm sorry, but I can't help with that." in done.stdout
    assert "row 0 (id-0): 4 times: A cat on a sofa." in done.stdout
    assert "row 1 (id-1): Dog [4, 2, 6, 3]" in done.stdout
    assert "'bird'" in done.stdout


@pytest.mark.parametrize(
    ("gate", "closed"),
    [
        ("repeated>0.05", "repeated of caption is 0.4"),
        ("repeated >= 40%", "repeated of caption is 0.4"),
        ("repeated>0.4", ""),
        ("caption.words_median<6", "words_median of caption is 5"),
        ("vqa.words_median<1", ""),
        ("words_median<2", "words_median of vqa is 1"),  # of every task that has it
        ("failed>0.05", "failed of detect is 0.1"),
        ("failed.parse_failed>0.05", "failed.parse_failed of detect is 0.1"),
        ("failed.image_missing>0", ""),  # it has not come
        ("detect.label.dog<0.2", "label.dog of detect is 0.1111"),
        ("detect.label.bird<=0", "label.bird of detect is 0"),
        ("script.latin<0.95", "script.latin of caption is 0.9"),
    ],
)
def test_gates(finished: Path, gate: str, closed: str) -> None:
    done = vlmbatch("quality", finished, "--fail-on", gate, "--json")
    assert done.exit_code == (3 if closed else 0), done
    assert done.json["passed"] is not bool(closed)
    failed = [line for line in done.stderr.splitlines() if line.startswith("Failed: ")]
    assert failed == ([f"Failed: {closed} (--fail-on {gate!r})"] if closed else [])


def test_several_gates_are_all_judged(finished: Path) -> None:
    gates = ["--fail-on", "loops>0.05", "--fail-on", "refusals>0.5", "--fail-on", "preambles>0.1"]
    done = vlmbatch("quality", finished, *gates)
    assert done.exit_code == 3, done
    assert done.stderr.count("Failed: ") == 2
    assert "passed: refusals of caption is 0.1" in done.stdout


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("repeatd>0.05", "did you mean 'repeated'?"),
        ("caption.boxes_tiny>0", "no such measure"),  # captions have no boxes
        ("failed.image_mising>0", "did you mean 'failed.image_missing'?"),
        ("json_valid<1", "no such measure"),
        ("repeated", "is no gate"),
        ("repeated=0.05", "is no gate"),
        ("repeated>a lot", "is no gate"),
        (">0.1", "is no gate"),
    ],
)
def test_a_gate_that_can_never_close_is_refused(finished: Path, gate: str, said: str) -> None:
    done = vlmbatch("quality", finished, "--fail-on", gate)
    assert done.exit_code == 2, done
    assert said in done.stderr
    assert "->" in done.stderr
    assert not done.stdout


def test_a_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    done = vlmbatch("quality", tmp_path)
    assert done.exit_code == 2, done
    assert "is no output of vlmbatch" in done.stderr


def test_a_run_without_answers_passes_every_gate(finished: Path, tmp_path: Path) -> None:
    done = vlmbatch(
        *("run", finished.parent / "m.parquet", "-t", "caption", *echo(reply_from="reply")),
        *("-o", tmp_path / "out", "--prepare"),
    )
    assert done.exit_code == 0, done
    done = vlmbatch("quality", tmp_path / "out", "--fail-on", "words_median<5", "--json")
    assert done.exit_code == 0, done
    assert done.json["gates"][0]["value"] is None


def test_forms_and_choices(tmp_path: Path) -> None:
    columns = {"reply": ["red", "red", "blue", "I like red", "red"], "id": list("abcde")}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    done = vlmbatch(
        *("run", manifest, "-t", "colour", "--prompt", "colour=Which colour?"),
        *("--choices", "red,blue,green", *echo(reply_from="reply"), "-o", tmp_path / "out"),
        *("--max-failure-rate", "1"),
    )
    assert done.exit_code == 0, done
    done = vlmbatch("quality", tmp_path / "out", "--json")
    metrics = done.json["tasks"]["colour"]["metrics"]
    assert metrics["misfit"] == 0.2
    assert metrics["failed.schema_mismatch"] == 0.2
    assert metrics["top_label"] == 0.75
    assert metrics["labels_unseen"] == 1
    assert done.json["tasks"]["colour"]["details"]["labels"]["unseen"] == ["green"]


def test_answers_that_were_cut(tmp_path: Path) -> None:
    columns = {"reply": ["one two three four five", "one"], "id": ["a", "b"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    words = ["run", manifest, "-t", "caption", "--max-tokens", "3"]
    words += echo(reply_from="reply", truncate="true")
    done = vlmbatch(*words, "-o", tmp_path / "out")
    assert done.exit_code == 0, done
    assert read_results(tmp_path / "out")["finish_reason"].to_pylist() == ["length", "stop"]
    done = vlmbatch("quality", tmp_path / "out", "--fail-on", "truncated>0.2")
    assert done.exit_code == 3, done
    assert "row 0 (a): one two three" in done.stdout


def test_results_that_are_not_gathered_yet_count_as_well(output: Path) -> None:
    """Of an output in the middle of a run: parts, shards, and a newer answer in a patch."""
    from vlmbatch.records import Range
    from vlmbatch.results.files import write_shard
    from vlmbatch.results.store import LocalStore

    run = json.loads((output / OURS / "run.json").read_text())["run"]
    last = pq.read_table(parts(output)[-1]).replace_schema_metadata().combine_chunks()
    parts(output)[-1].unlink()
    store, rows = LocalStore(output), last["row"].to_pylist()
    batch = last.to_batches()[0]
    write_shard(store, batch, run=run, epoch=1, rows=Range(rows[0], rows[-1] + 1))
    old = pq.read_table(parts(output)[0]).replace_schema_metadata().combine_chunks()
    old = old.filter(
        pa.compute.and_(pa.compute.equal(old["row"], 0), pa.compute.equal(old["task"], "caption"))
    )
    at = old.schema.get_field_index("text")
    new = old.set_column(at, old.schema.field(at), pa.array(["A whale."])).combine_chunks()
    write_shard(store, new.to_batches()[0], run=run, epoch=9, rows=Range(0, 1), patch=True)
    assert len(shards(output)) == 2
    done = vlmbatch("quality", output, "--json")
    assert done.exit_code == 0, done
    assert done.json["results"] == 30
    assert done.json["tasks"]["caption"]["metrics"]["repeated"] == 0.3


def test_one_image_may_have_the_same_text_several_times(tmp_path: Path) -> None:
    """Rows about one picture, and samples, are not other images."""
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(picture())
    columns = {
        "image": ["a.png", "a.png", "b.png"],
        "id": list("abc"),
        "reply": ["x y", "x y", "z"],
    }
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    words = ["run", manifest, "-t", "caption", *echo(reply_from="reply"), "-o", tmp_path / "out"]
    assert vlmbatch(*words, "--num-samples", "2", "--temperature", "1").exit_code == 0
    done = vlmbatch("quality", tmp_path / "out", "--json")
    texts = Counter(read_results(tmp_path / "out")["text"].to_pylist())
    assert texts.total() == 6
    assert done.json["tasks"]["caption"]["metrics"]["repeated"] == 0


def test_who_may_not_write_sees_the_figures_all_the_same(output: Path) -> None:
    """Root may write anywhere: here the place of the file is taken by a folder."""
    shutil.rmtree(output / OURS / "tmp")
    (output / OURS / "tmp").write_text("in the way")
    (output / OURS / "quality.json").unlink(missing_ok=True)
    done = vlmbatch("quality", output)
    assert done.exit_code == 0, done
    assert "not stored" in done.stderr
    assert "caption: 10 results" in done.stdout


def test_all_names_of_measures_are_in_the_json(found: dict[str, Any]) -> None:
    """What gates may name is known before anything is measured."""
    from vlmbatch.job import TaskSpec
    from vlmbatch.quality.measures import Subject, measures_of
    from vlmbatch.quality.measuring import LABELS, TEXTS
    from vlmbatch.quality.scratch import Scratch
    from vlmbatch.tasks import make_task

    with Scratch({"texts": TEXTS, "labels": LABELS}) as scratch:
        for name, task in found["tasks"].items():
            spec = TaskSpec(name=name, labels=["cat", "dog", "bird"] if name == "detect" else None)
            subject = Subject(make_task(spec), 0, 10, scratch, lambda row: None)  # type: ignore
            measures = measures_of(subject)
            names = {name for measure in measures for name in measure.names}
            families = tuple(family for measure in measures for family in measure.families)
            assert names <= set(task["metrics"])
            assert all(n in names or n.startswith(families) for n in task["metrics"])


def test_languages(tmp_path: Path) -> None:
    pytest.importorskip("py3langid", reason="the extra `quality` is not installed")
    replies = [
        *["A group of people standing on a beach next to the ocean."] * 3,
        "Eine Gruppe von Menschen steht am Strand neben dem Meer.",
        "a cat",  # too short to tell
    ]
    columns = {"reply": replies, "id": list("abcde")}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    words = ["run", manifest, "-t", "caption", *echo(reply_from="reply"), "-o", tmp_path / "out"]
    assert vlmbatch(*words).exit_code == 0
    done = vlmbatch("quality", tmp_path / "out", "--json", "--fail-on", "language.en<0.9")
    assert done.exit_code == 3, done
    metrics = done.json["tasks"]["caption"]["metrics"]
    assert {n: v for n, v in metrics.items() if "language" in n} == {
        "other_language": 0.25,
        "language.en": 0.75,
        "language.de": 0.25,
    }
    assert done.json["tasks"]["caption"]["details"]["languages"] == {"judged": 5, "told": 4}


def test_without_the_library_languages_are_said_to_be_missing(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)
    done = vlmbatch("quality", finished)
    assert "pip install 'vlmbatch[quality]'" in done.stdout
    done = vlmbatch("quality", finished, "--fail-on", "language.en<0.9")
    assert done.exit_code == 2, done
    assert "pip install 'vlmbatch[quality]'" in done.stderr


def test_starting_anew_forgets_what_was_found(output: Path) -> None:
    assert vlmbatch("quality", output).exit_code == 0
    manifest = json.loads((output / OURS / "run.json").read_text())["job"]["manifest"]
    words = ["run", *manifest, "-t", "caption", *echo(reply_from="reply"), "-o", output]
    assert vlmbatch(*words, "--overwrite").exit_code == 0
    assert not (output / OURS / "quality.json").exists()


def test_an_answer_of_points_is_not_empty(tmp_path: Path) -> None:
    replies = ['[{"point_2d": [500, 250], "label": "cat"}]', "[]"]
    columns = {"image": [picture(40, 20)] * 2, "reply": replies}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    run = vlmbatch(
        *("run", manifest, "-t", "detect", "--labels", "cat", "--family", "qwen3_vl"),
        *(*echo(reply_from="reply"), "-o", tmp_path / "out"),
    )
    assert run.exit_code == 0, run
    done = vlmbatch("quality", tmp_path / "out", "--json")
    assert done.json["tasks"]["detect"]["metrics"]["empty"] == 0.5
