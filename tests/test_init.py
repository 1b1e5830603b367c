"""``vlmbatch init`` looks at a manifest and writes a spec that runs as it is."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.harness import picture, read_results, vlmbatch, write_manifest
from vlmbatch.job import JobSpec, spec_from
from vlmbatch.tasks import make_task


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(*args: str | Path) -> JobSpec:
    ended = vlmbatch("init", *args)
    assert ended.exit_code == 0, ended
    return spec_from(yaml.safe_load(Path("job.yaml").read_text()), where="job.yaml")


def asked(spec: JobSpec) -> list[str]:
    return [make_task(task).name for task in spec.tasks]


def commented(spec_file: Path = Path("job.yaml")) -> JobSpec:
    """With the tasks that are comments switched on."""
    text = spec_file.read_text().replace("\n  # - name", "\n  - name").replace("\n  #   ", "\n    ")
    return spec_from(yaml.safe_load(text), where=str(spec_file))


@pytest.mark.parametrize(
    ("columns", "tasks"),
    [
        ({}, ["caption"]),
        ({"question": ["q"]}, ["vqa"]),
        ({"questions": [["q", "r"]]}, ["vqa"]),
        ({"phrase": ["a dog"], "labels": [["dog"]]}, ["ground", "detect"]),
    ],
)
def test_the_columns_say_what_is_asked(columns: dict[str, list[object]], tasks: list[str]) -> None:
    write_manifest(Path("m.parquet"), {"title": ["a"], **columns})
    spec = written("m.parquet")
    assert asked(spec) == tasks
    assert (spec.model, spec.output) == ("demo", f"m-{'+'.join(tasks)}")
    assert set(asked(commented())) >= {*tasks, "caption", "keywords"}


def test_the_spec_runs_as_it_is() -> None:
    pq.write_table(
        pa.table({"photo url": [picture()] * 2, "labels": [["red square"]] * 2}), "m d.parquet"
    )
    ended = vlmbatch("init", "m d.parquet", "-m", "demo", "-o", "my job.yaml")
    assert ended.exit_code == 0, ended
    assert ended.stdout.startswith("my job.yaml: 2 rows in 1 file, detect by demo\n")
    run = vlmbatch("run", "--job", "my job.yaml", "--json")
    assert run.exit_code == 0, run
    assert run.json["ok"] == 2
    assert read_results(Path("m d-detect"))["question"].to_pylist() == ['["red square"]'] * 2


def test_a_folder_of_pictures_is_captioned() -> None:
    Path("holiday").mkdir()
    for name in ("a.png", "b.png"):
        Path("holiday", name).write_bytes(picture())
    spec = written("holiday")
    assert (spec.manifest, asked(spec), spec.output) == (
        ["holiday"],
        ["caption"],
        "holiday-caption",
    )


def test_several_manifests_are_a_list() -> None:
    for name in ("a.parquet", "b.parquet"):
        write_manifest(Path(name), {"id": ["x"]})
    assert written("a.parquet", "b.parquet").manifest == ["a.parquet", "b.parquet"]


def test_a_task_that_the_model_was_not_trained_for_is_left_out() -> None:
    Path("smol").mkdir()
    Path("smol/config.json").write_text('{"model_type": "idefics3"}')
    write_manifest(Path("m.parquet"), {"labels": [["dog"]]})
    assert asked(written("m.parquet", "-m", "./smol")) == ["caption"]
    assert "# - name: detect      # the manifest has the column" in Path("job.yaml").read_text()


def test_nothing_is_overwritten_unasked() -> None:
    write_manifest(Path("m.parquet"), {"id": ["x"]})
    Path("job.yaml").write_text("precious")
    ended = vlmbatch("init", "m.parquet")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "job.yaml is there already" in ended.stderr
    assert Path("job.yaml").read_text() == "precious"
    assert asked(written("m.parquet", "--overwrite")) == ["caption"]


def test_what_is_no_manifest_is_exit_code_2() -> None:
    pq.write_table(pa.table({"number": [1]}), "n.parquet")
    for words, message in {
        ("gone.parquet",): "no manifest gone.parquet",
        ("n.parquet",): "no column 'image' in n.parquet (it has: number)",
        (".", "-m", "./nowhere"): "no such model folder: ./nowhere",
    }.items():
        if words[0] == ".":
            Path("n.parquet").unlink()
            write_manifest(Path("m.parquet"), {"id": ["x"]})
        ended = vlmbatch("init", *words)
        assert (ended.exit_code, ended.stdout) == (2, ""), (words, str(ended))
        assert message in ended.stderr
    assert not Path("job.yaml").exists()
