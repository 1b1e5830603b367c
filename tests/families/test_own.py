"""Families from outside: a file of the user's own (that of examples/), and installed packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import picture, read_results, run_json, vlmbatch, write_manifest
from vlmbatch.families import family_for
from vlmbatch.records import TaskKind
from vlmbatch.tasks import Ask

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_family.py"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    columns = {
        "image": [picture(400, 200)] * 3,
        "answer": ["cat: 256 512 512 768; dog: 0 0 1024 1024", "none", "?"],
    }
    return write_manifest(tmp_path / "m.parquet", columns)


def run(manifest: Path, family: Path | str, *more: str, name: str = "out"):
    words = ["run", manifest, "-t", "detect", "--labels=cat,dog", "-o", manifest.parent / name]
    echo = ["--engine=echo", "--engine-arg=reply_from=answer", "--max-failure-rate=1"]
    return vlmbatch(*words, *echo, "--family", family, *more)


def test_the_example_reads_boxes_and_words_prompts(manifest: Path) -> None:
    done = run(manifest, EXAMPLE)
    assert done.exit_code == 0, done
    boxes = read_results(manifest.parent / "out")["boxes"].to_pylist()
    assert [[tuple(box.values())[:5] for box in each] for each in boxes[:2]] == [
        [("cat", 100, 100, 200, 150), ("dog", 0, 0, 400, 200)],
        [],
    ]
    assert boxes[2] is None
    family = family_for({}, str(EXAMPLE))
    assert family.word(Ask(TaskKind.DETECT, labels=("cat",))).startswith("Where is cat?")
    stored = run_json(manifest.parent / "out")
    assert stored["job"]["family"] == str(EXAMPLE)
    assert stored["ask"]["family"] == "my_family"
    assert stored["ask"]["tasks.detect.words"].startswith("Where is {label}, {label}?")


def test_an_output_is_not_continued_with_a_changed_file(manifest: Path) -> None:
    own = manifest.parent / "own.py"
    shutil.copy(EXAMPLE, own)
    assert run(manifest, own).exit_code == 0
    assert run(manifest, own).exit_code == 0
    own.write_text(own.read_text().replace("GridSpace(1024)", "GridSpace(512)"))
    changed = run(manifest, own)
    assert changed.exit_code == 2
    assert "family_file was" in changed.stderr
    again = vlmbatch("reparse", manifest.parent / "out", "--family", own, "--json")
    assert again.json["changed"] == 1
    assert run(manifest, own).exit_code == 0
    own.write_text(own.read_text().replace("Where is", "Find"))
    other = run(manifest, own)
    assert other.exit_code == 2
    assert "tasks.detect.words: was 'Where is {label}" in other.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no ENTRY"),
        ("ENTRY = 3\n", "has an ENTRY that is a int"),
        ("import nothing_of_this_name\n", "fails in line 1: ModuleNotFoundError"),
        ("x = 1\ndef f(:\n", "fails in line 2: SyntaxError"),
        ("def f():\n    raise ValueError('?')\n\nf()\n", "fails in line 2: ValueError('?')"),
    ],
)
def test_a_broken_file_is_told_in_a_line(manifest: Path, text: str, message: str) -> None:
    own = manifest.parent / "own.py"
    own.write_text(text)
    done = run(manifest, own)
    assert done.exit_code == 2
    assert f"the family file {own} {message}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_not_there(manifest: Path) -> None:
    done = run(manifest, "no/such.py")
    assert done.exit_code == 2
    assert "cannot read the family file no/such.py: No such file" in done.stderr


def test_models_shows_how_a_model_is_asked_by_it() -> None:
    done = vlmbatch("models", "demo", "--family", EXAMPLE, "--json")
    assert done.json["family"] == "my_family"
    assert done.json["prompts"]["ground"].startswith("Where is {phrase}?")
    assert vlmbatch("models", "--family", EXAMPLE).exit_code == 2


def installed(folder: Path, value: str) -> dict[str, str]:
    """The environment of a process in which a package with a family is installed."""
    shutil.copy(EXAMPLE, folder / "my_family.py")
    info = folder / "my_vlm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-vlm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vlmbatch.families]\nmy_family = {value}\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def in_process(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlmbatch", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_installed_package_brings_a_family(manifest: Path, tmp_path: Path) -> None:
    environment = installed(tmp_path, "my_family:ENTRY")
    assert "my_family" in in_process(environment, "models").stdout
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "my_vlm"}')
    shown = in_process(environment, "models", str(model))
    assert "my_family" in shown.stdout, shown
    words = ["run", str(manifest), "-t", "detect", "--labels=cat", "-m", str(model)]
    echo = ["--engine=echo", "--engine-arg=reply_from=answer", "--max-failure-rate=1"]
    done = in_process(environment, *words, *echo, "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done
    assert "family my_family" in done.stderr
    assert read_results(tmp_path / "out")["boxes"][0].as_py()[0]["x1"] == 100


def test_a_package_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    done = in_process(installed(tmp_path, "my_family:NO_SUCH"), "models")
    assert done.returncode == 2
    assert "the family 'my_family' of my_family:NO_SUCH cannot be loaded" in done.stderr
