"""The bundled model, end to end through the command line, on pictures that it has not seen."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.accuracy import measure
from tests.easy_vqa_data import easy_vqa_images, truth, write_manifest
from vlmbatch.models import demo_path


def run(*words: str) -> dict[str, object]:
    command = [sys.executable, "-m", "vlmbatch", "run", *words, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    summary: dict[str, object] = json.loads(ended.stdout)
    return summary


def test_it_answers_a_hundred_unseen_pictures(tmp_path: Path) -> None:
    scores = measure(tmp_path, rows=100)
    assert scores["questions"]["of"] > 900
    assert scores["questions"]["share"] >= 0.95, scores
    assert scores["captions"]["share"] >= 0.92, scores
    assert scores["boxes"]["share"] >= 0.92, scores


def test_boxes_are_in_pixels_of_the_upright_image(tmp_path: Path) -> None:
    """The same picture, stored sideways with an EXIF orientation and five times as large."""
    number = next(n for n, known in truth("test").items() if known.caption)
    known = truth("test")[number]
    with Image.open(easy_vqa_images("test")[number]) as picture:
        upright = picture.convert("RGB").resize((320, 192), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left: to be shown turned right
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    upright.save(tmp_path / "upright.jpg", quality=95)
    manifest = tmp_path / "m.parquet"
    pq.write_table(pa.table({"image": ["turned.jpg", "upright.jpg"]}), manifest)
    phrase = f"the {known.colour} {known.shape}"
    output = tmp_path / "out"
    run(str(manifest), "-m", "demo", "-t", "ground", "--phrase", phrase, "-o", str(output))
    turned, straight = pq.read_table(output).to_pylist()
    assert (turned["image_width"], turned["image_height"]) == (320, 192)
    assert [turned["model_image_width"], turned["model_image_height"]] == [64, 64]
    (found,), (same,) = turned["boxes"], straight["boxes"]
    x1, y1, x2, y2 = known.box
    wanted = (x1 * 5, y1 * 3, x2 * 5, y2 * 3)
    for box in (found, same):
        for edge, expected in zip(
            (box["x1"], box["y1"], box["x2"], box["y2"]), wanted, strict=True
        ):
            assert abs(edge - expected) <= 25, (box, wanted)
        assert box["label"] == phrase


def test_how_answers_are_picked_reaches_the_model(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", rows=3)
    asked = [str(manifest), "-m", "demo", "-t", "caption"]

    def answers(name: str, *words: str) -> list[dict[str, Any]]:
        run(*asked, *words, "-o", str(tmp_path / name))
        found: list[dict[str, Any]] = pq.read_table(tmp_path / name).to_pylist()
        return found

    plain = answers("plain")
    shape = str(plain[0]["text"]).split()[-1]
    assert answers("stopped", f"--stop={shape}")[0]["text"] == plain[0]["text"][: -len(shape) - 1]
    penalised = answers("penalised", "--repetition-penalty=30", "--min-tokens=12")
    assert [r["text"] for r in penalised] != [r["text"] for r in plain]
    exact = ["--min-tokens=20", "--max-tokens=20"]
    sampled = answers("samples", *exact, "--num-samples=4", "--temperature=3", "--seed=1")
    assert {(r["completion_tokens"], r["finish_reason"]) for r in sampled} == {(20, "length")}
    assert [(r["row"], r["sample"]) for r in sampled] == [
        (i, n) for i in range(3) for n in range(4)
    ]
    assert len({r["text"] for r in sampled if r["row"] == 0}) > 1


def test_its_chat_template_words_conversations_as_smolvlms_own_does() -> None:
    """Trainers render whole conversations with it: what stands before an answer there must be what
    asks for one here."""
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    def text(said: str) -> dict[str, str]:
        return {"type": "text", "text": said}

    turns = [
        {"role": "system", "content": [text("Be short.")]},
        {"role": "user", "content": [{"type": "image"}, text("What is it?")]},
        {"role": "assistant", "content": [text("a red circle")]},
        {"role": "user", "content": [text("What else?")]},
    ]
    ours, smolvlms = (
        jinja2.Template(template)
        for template in ((demo_path() / "chat_template.jinja").read_text(), DEFAULT_CHAT_TEMPLATE)
    )
    for messages in (turns, turns[:3], turns[1:2]):
        for prompt in (True, False):
            words = {"messages": messages, "add_generation_prompt": prompt}
            assert ours.render(words) == smolvlms.render(words)


def test_local_and_ray_give_the_same_answers_at_batch_size_1(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", rows=8)
    words = [str(manifest), "-m", "demo", "-t", "caption", "--batch-size", "1"]
    for executor in ("local", "ray"):
        run(*words, "--executor", executor, "-o", str(tmp_path / executor))
    local, ray = (pq.read_table(tmp_path / name) for name in ("local", "ray"))
    assert local.equals(ray)


def test_without_m_the_demo_model_stands_in_and_says_so(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", rows=3)
    summary = run(str(manifest), "-o", str(tmp_path / "out"))
    assert str(summary["model"]).startswith("demo@")
    assert "demo model answers" in str(summary["warnings"])
    again = run(str(manifest), "-o", str(tmp_path / "out"))
    assert again["skipped"] == 3
