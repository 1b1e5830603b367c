"""``vlmbatch plan`` says what ``vlmbatch run`` then does: the same rows, failures and refusals, at
no cost and without a trace."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.bad_images import make_images
from tests.harness import Finished, echo, picture, quiz, vlmbatch, write_manifest
from tests.s3 import S3Endpoint, forget_connections

DEMO = ["-m", "demo", "--engine", "echo"]
"""As the demo model is asked, without it."""


def plan(*options: str | Path) -> Finished:
    return vlmbatch("plan", *options, "--json")


def planned(*options: str | Path) -> Any:
    ended = plan(*options)
    assert ended.exit_code == 0, ended
    return ended.json


def paths(folder: Path, names: list[str | None]) -> Path:
    """A manifest that names these images."""
    path = folder / "paths.parquet"
    pq.write_table(pa.table({"image": pa.array(names, pa.string())}), path)
    return path


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = quiz(tmp_path, 30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = made.path.stat()
    found = planned(*made.options)
    assert found["output"] == "quiz-vqa"
    assert [path.name for path in tmp_path.iterdir()] == ["quiz.parquet"]
    assert made.path.stat().st_mtime_ns == before.st_mtime_ns


def test_rows_requests_commits_and_parts_are_those_of_the_run(tmp_path: Path) -> None:
    made = quiz(tmp_path, 50, row_group=7)
    options = [*made.options, "-o", tmp_path / "out", "--part-rows=20", "--checkpoint-rows=8"]
    found = planned(*options)
    ran = vlmbatch("run", *options, "--json").json
    assert (found["rows"], found["to_do"], found["answered"]) == (50, 50, 0)
    assert found["requests"] == {"count": ran["requests"], "counted": "counted"}
    assert ran["requests"] == 67
    assert found["parts"] == len(list((tmp_path / "out").glob("part-*"))) == 3
    assert found["commits"] == 7
    assert (found["executor"], found["workers"]) == (ran["executor"], ran["workers"])


def test_where_each_row_gives_as_many_requests_nothing_is_read_to_count_them(
    tmp_path: Path,
) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"id": [str(i) for i in range(40)]})
    more = ["--num-samples=3", "--temperature=1", "--limit=30"]
    found = planned(manifest, "-t", "caption", "-t", "ocr", *echo(), *more)
    assert found["requests"] == {"count": 30 * 2 * 3, "counted": "exact"}
    assert found["rows"] == 30


def test_requests_of_a_tar_are_estimated_and_it_says_so(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for row in range(20):
            about = json.dumps({"questions": ["what?", "where?"]}).encode()
            for name, data in ((f"{row:03}.png", picture()), (f"{row:03}.json", about)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found = planned(tmp_path / "rows.tar", "-t", "vqa", *echo(), "--sample=10")
    assert found["requests"] == {"count": 40, "counted": "estimated"}
    assert found["sample"]["rows"] == 10


def test_the_sample_finds_what_the_run_then_finds(tmp_path: Path) -> None:
    cases = make_images(tmp_path / "images")
    manifest = paths(tmp_path / "images", [case.image for case in cases])
    options = [manifest, *echo(), "-o", tmp_path / "out"]
    found = plan(*options, "--sample=1000")
    ran = vlmbatch("run", *options, "--max-failure-rate=1", "--json").json
    assert found.exit_code == 3, found
    sample = found.json["sample"]
    assert {code: each["rows"] for code, each in sample["problems"].items()} == ran["failures"]
    assert (sample["rows"], sample["failed"]) == (len(cases), ran["failed"])
    assert "sampled rows would fail" in found.stderr
    sizes = [case.size for case in cases if case.status == "ok"]
    assert sample["images"]["count"] == len(sizes)
    assert sorted(sample["images"]["largest"]) == [1, 500]
    assert sample["images"]["smallest"] == [1, 1]
    missing = sample["problems"]["image_missing"]["examples"]
    row = next(number for number, case in enumerate(cases) if case.status == "image_missing")
    assert len(missing) == 3
    assert missing[0].startswith(f"row {row}: ")
    allowed = plan(*options, "--sample=1000", "--max-failure-rate=1", "-o", tmp_path / "other")
    assert allowed.exit_code == 0, allowed


def test_the_sample_is_spread_over_the_manifest_and_always_the_same(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(picture())
    manifest = paths(tmp_path, ["good.png"] * 900 + ["gone.png"] * 100)
    options = [manifest, *echo(), "--sample=50", "--max-failure-rate=0.5"]
    first, again = planned(*options)["sample"], planned(*options)["sample"]
    assert (first["rows"], first["failed"], first["failure_rate"]) == (50, 5, 0.1)
    assert first["problems"] == again["problems"]


@pytest.mark.parametrize(("row_group", "read"), [(3000, 2048), (100, 2048 // 30)])
def test_of_images_in_the_manifest_few_are_read(tmp_path: Path, row_group: int, read: int) -> None:
    """Only what begins the groups; those behind are broken, and are not seen."""
    images = [picture() if row % row_group < read else b"broken" for row in range(3000)]
    manifest = write_manifest(tmp_path / "m.parquet", {"image": images}, row_group)
    found = planned(manifest, *echo())
    assert 55 <= found["sample"]["rows"] <= 64
    assert found["sample"]["failed"] == 0


def test_images_in_a_store_are_fetched_from_there(
    s3_server: S3Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = s3_server.fs()
    fs.mkdir("plan")
    fs.pipe_file("plan/here.png", picture())
    manifest = paths(tmp_path, ["s3://plan/here.png", "s3://plan/gone.png"])
    options = [manifest, *echo(), "-o", "s3://plan/out", "--max-failure-rate=0.5"]
    with s3_server.in_environment():
        found = planned(*options)
        assert {code: each["rows"] for code, each in found["sample"]["problems"].items()} == {
            "image_missing": 1
        }
        assert found["sample"]["images"]["count"] == 1
        assert fs.ls("plan", refresh=True) == ["plan/here.png"]
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        forget_connections()
        refused = plan(*options)
    assert (refused.exit_code, refused.stdout) == (1, ""), refused


def test_a_resume_is_planned_for_what_is_left(tmp_path: Path) -> None:
    made = quiz(tmp_path, 50)
    options = [*made.options, *echo(fail_rows="1,4"), "-o", tmp_path / "out"]
    assert vlmbatch("run", *options, "--limit=20").exit_code == 0
    found = planned(*options)
    assert (found["rows"], found["answered"], found["to_do"]) == (50, 20, 30)
    assert found["failed_earlier"] == 2
    assert found["requests"]["count"] == 40
    assert found["prompts"][0]["row"] == 20
    assert "this output's last start" in found["estimate"]["by"]
    assert vlmbatch("run", *options).exit_code == 0
    done = planned(*options)
    assert (done["answered"], done["to_do"], done["requests"]["count"]) == (50, 0, 0)
    assert (done["sample"]["rows"], done["prompts"]) == (0, [])
    anew = planned(*options, "--overwrite")
    assert (anew["answered"], anew["to_do"]) == (0, 50)


@pytest.mark.parametrize("changed", [["--style=detailed"], ["--max-tokens=9"], ["--part-rows=9"]])
def test_what_the_run_would_refuse_the_plan_refuses(tmp_path: Path, changed: list[str]) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"id": ["a", "b"]})
    options = [manifest, *echo(), "-o", tmp_path / "out"]
    assert vlmbatch("run", *options).exit_code == 0
    refused, run = plan(*options, *changed), vlmbatch("run", *options, *changed)
    assert (refused.exit_code, refused.stdout, run.exit_code) == (2, "", 2), refused
    assert refused.stderr.splitlines()[:2] == run.stderr.splitlines()[:2]


def test_a_missing_column_a_foreign_folder_and_a_missing_model_end_with_2(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"id": ["a"]})
    for options, said in (
        (["-t", "vqa", *echo()], "needs a column 'question'"),
        ([*echo(), "-o", tmp_path], "holds something else"),
        (["-m", tmp_path / "nowhere"], "no such model folder"),
    ):
        refused = plan(manifest, *options)
        assert (refused.exit_code, refused.stdout) == (2, ""), refused
        assert said in refused.stderr


def test_prompts_are_those_of_the_family(tmp_path: Path) -> None:
    columns = {"phrase": ["the red circle", "a square", ""]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    more = ["--system=Be brief.", "--max-failure-rate=0.5"]
    found = planned(manifest, "-t", "caption", "-t", "ground", *DEMO, *more)
    assert found["family"] == "demo"
    assert (found["prompt_form"], found["system"]) == ("user's turn", "Be brief.")
    prompts = [(each["row"], each["task"], each["prompt"]) for each in found["prompts"]]
    assert prompts == [
        (0, "caption", "Describe the image briefly."),
        (0, "ground", "Locate: the red circle"),
        (1, "caption", "Describe the image briefly."),
        (1, "ground", "Locate: a square"),
        (2, "caption", "Describe the image briefly."),
        (2, "ground", ""),
    ]
    assert found["prompts"][5]["problem"] == "the phrase is null or empty"
    whole = planned(manifest, "-t", "ground", *echo(), "--family=kosmos2", "--limit=1")
    assert whole["prompt_form"] == "whole"
    assert "<image>" in whole["prompts"][0]["prompt"]


def test_image_tokens_follow_the_sizes_of_the_images(tmp_path: Path) -> None:
    Image.new("RGB", (280, 560)).save(tmp_path / "a.png")
    Image.new("RGB", (280, 280)).save(tmp_path / "b.png")
    manifest = paths(tmp_path, ["a.png", "b.png"])
    found = planned(manifest, *echo(), "--family=qwen2_5_vl", "--max-tokens=10")
    # 28 pixels a token, each way
    assert found["tokens"]["image"] == (10 * 20 + 10 * 10) / 2
    assert found["tokens"]["text_by"] == "a guess of 4 bytes each"
    text = len(found["prompts"][0]["prompt"]) / 4
    assert found["tokens"]["text"] == pytest.approx(text, abs=0.06)
    assert found["tokens"]["prompt_total"] == round(2 * (150 + text))
    assert (found["tokens"]["answer_by"], found["tokens"]["answer_total"]) == ("at most", 20)


def test_time_and_cost_follow_the_rates(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"id": [str(i) for i in range(60)]})
    options = [manifest, *echo(), "--family=demo", "--max-tokens=33", "--workers=2"]
    assert planned(*options)["estimate"] is None
    by_images = planned(*options, "--images-per-second=5", "--price-per-gpu-hour=3600")
    assert by_images["estimate"] == {
        "seconds": 6.0,
        "by": "at 5 images/s per worker",
        "gpu_hours": round(12 / 3600, 3),
        "cost": 12.0,
    }
    by_tokens = planned(*options, "--tokens-per-second=100")
    tokens = by_tokens["tokens"]
    assert tokens["image"] == 67
    assert tokens["answer_total"] == 60 * 33
    total = tokens["prompt_total"] + tokens["answer_total"]
    assert by_tokens["estimate"]["seconds"] == pytest.approx(total / 200, abs=0.1)
    both = planned(*options, "--images-per-second=5", "--tokens-per-second=100")
    assert both["estimate"]["seconds"] == by_tokens["estimate"]["seconds"]  # the slower
    unknown = plan(manifest, *echo(), "--tokens-per-second=100")
    assert unknown.json["estimate"] is None
    assert "what an image costs in tokens is not known" in unknown.stderr


def test_tried_rows_are_answered_by_the_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    columns = {"image": [picture(64, 64, "red"), b"broken", picture()], "id": ["a", "b", "c"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    options = [manifest, "-m", "demo", "--engine=transformers", "--max-failure-rate=0.5"]
    found = planned(*options, "--try=2", "-o", tmp_path / "out")
    tried = found["tried"]
    assert (tried["rows"], tried["failed"]) == (2, 1)
    good, bad = tried["results"]
    assert (good["row"], good["status"], bad["row"]) == (0, "ok", 1)
    assert good["text"]
    assert bad["error"]["code"] == "image_unreadable"
    assert found["to_do"] == 3
    assert found["tokens"]["text_by"] == "the model's tokenizer"
    assert found["tokens"]["answer"] == good["completion_tokens"]
    assert found["tokens"]["answer_by"] == "as tried"
    told = found["tokens"]["image"] + found["tokens"]["text"]
    assert told < good["prompt_tokens"] < told + 20  # the chat template's
    assert "as the tried ones" in found["estimate"]["by"]
    assert not list((tmp_path / "tmp").iterdir())
    assert not (tmp_path / "out").exists()


def test_a_person_reads_it_in_one_screen(tmp_path: Path) -> None:
    made = quiz(tmp_path, 12)
    ended = vlmbatch(
        "plan", *made.options, "-o", tmp_path / "out", "--try=1", "--images-per-second=2"
    )
    assert ended.exit_code == 0, ended
    lines = ended.stdout.splitlines()
    assert lines[0] == f"plan: 12 rows in 1 file -> {tmp_path / 'out'}, nothing written"
    assert len(lines) < 30
    for start in (
        "  rows      12: 12 to do, 0 answered earlier",
        "  requests  16 (counted row by row)",
        "  sample    12 rows in ",
        "  time      0:00:06 h at 2 images/s per worker",
        "  prompts   the user's turn;",
        "            row 0 vqa: question 0.0?",
        "  tried     the first row: 0 failed",
        "            row 0 vqa question 0.0?: answer 0.0",
    ):
        assert any(line.startswith(start) for line in lines), (start, ended.stdout)
