"""``vlmbatch doctor`` names what stands in the way, with a remedy, and nothing else does."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.harness import Quiz, quiz, run_command, vlmbatch, write_manifest
from tests.s3 import S3Endpoint
from vlmbatch.doctor import describe, jobs, machine, problems
from vlmbatch.doctor.findings import Check, Finding, findings_of, ok
from vlmbatch.errors import UsageError
from vlmbatch.job import EngineSpec, JobSpec, spec_from
from vlmbatch.results.store import LocalStore

CLOSED = 9
"""A port at which nothing listens."""


@pytest.fixture
def made(tmp_path: Path) -> Quiz:
    return quiz(tmp_path, 5)


def job(manifest: Path | str, output: Path | str, **more: object) -> JobSpec:
    values = {"manifest": str(manifest), "output": str(output), "engine": {"name": "echo"}, **more}
    return spec_from(values, where="the test")


def about(spec: JobSpec) -> dict[str, Finding]:
    """What is found about the job alone, by name."""
    return {each.name: each for each in findings_of(jobs.checks_of(spec))}


def test_the_installation_alone() -> None:
    ended = run_command("doctor", "--json")
    findings = {each["name"]: each for each in ended.json}
    assert ended.exit_code == int(any(each["status"] == "problem" for each in ended.json)), ended
    names = ["python", "vlmbatch", "torch", "transformers", "torchvision", "vllm", "ray", "gpus"]
    assert [*findings][:8] == names
    assert findings["ray"]["status"] == "ok"
    assert findings["torch"]["what"][0].isdigit()
    assert findings["hub"]["what"].startswith("HF_HUB_OFFLINE is set")
    assert all(each["remedy"] for each in ended.json if each["status"] == "problem")


def test_a_job_that_can_run_and_then_one_that_cannot(made: Quiz, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    fine = vlmbatch("doctor", *made.options, "-o", tmp_path / "out")
    assert fine.exit_code == 0, fine
    assert fine.stdout.endswith("nothing stands in the way\n")
    assert "5 rows to do: vqa by echo (echo)" in fine.stdout
    assert "5 of 5 sampled rows can be asked about" in fine.stdout
    assert sorted(tmp_path.iterdir()) == before
    refused = vlmbatch("doctor", made.path, "-t", "vqa", "-m", tmp_path / "gone", "-o", tmp_path)
    assert refused.exit_code == 1, refused
    assert "no such model folder" in refused.stdout
    assert "holds something else" in refused.stdout
    assert refused.stdout.splitlines()[-1].endswith("problems")


def test_a_spec_that_is_none_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("manifest: m.parquet\nmodle: demo\n")
    ended = vlmbatch("doctor", "--job", path, "--json")
    assert ended.exit_code == 1, ended
    first, *_, finding = ended.json
    assert first["name"] == "python"
    assert (finding["name"], finding["status"]) == ("job", "problem")
    assert "did you mean 'model'" in finding["what"]


def test_a_model_alone(tmp_path: Path) -> None:
    found = findings_of(jobs.model_checks(jobs.Model("demo")))
    assert [each.status for each in found] == ["ok", "ok"], found
    assert "family demo" in found[0].what
    gone = findings_of(jobs.model_checks(jobs.Model("owner/gone")))
    assert gone[0].status == "problem"
    assert "HF_HUB_OFFLINE" in gone[0].what
    assert gone[0].remedy
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    bare, engine = findings_of(
        jobs.model_checks(jobs.Model(str(tmp_path), engine=EngineSpec(name="transformers")))
    )
    assert (bare.status, engine.status) == ("problem", "problem")
    assert "no weights" in bare.what
    assert "does not know the model type 'nobody_knows'" in engine.what


def test_an_output_below_a_file(made: Quiz, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = about(job(made.path, tmp_path / "file" / "out"))["output"]
    assert (found.status, found.remedy) == ("problem", "give another output with -o")
    assert "is a file" in found.what


def test_an_output_that_another_run_holds(made: Quiz, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "out")
    store.make()
    assert about(job(made.path, tmp_path / "out"))["output"].status == "ok"
    with store.lock():
        found = about(job(made.path, tmp_path / "out"))["output"]
    assert found.status == "problem"
    assert "another run holds" in found.what


def test_stores_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with S3Endpoint(CLOSED).in_environment():
        found = about(job("s3://bucket/m.parquet", "s3://bucket/run"))
    assert (found["manifest"].status, found["output"].status) == ("problem", "problem"), found
    assert "s3://bucket/m.parquet" in found["manifest"].what
    assert "s3://bucket/run" in found["output"].what
    assert found["manifest"].remedy
    assert found["output"].remedy


def test_a_store_that_answers(s3_server: S3Endpoint, made: Quiz) -> None:
    fs = s3_server.fs()
    fs.mkdir("doctor")
    fs.put_file(str(made.path), "doctor/m.parquet")
    with s3_server.in_environment():
        found = about(job("s3://doctor/m.parquet", "s3://doctor/run"))
    assert (found["manifest"].status, found["output"].status) == ("ok", "ok"), found
    assert fs.ls("doctor", refresh=True) == ["doctor/m.parquet"]


def test_a_job_that_would_be_refused(made: Quiz, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert vlmbatch("run", *made.options, "-o", output).exit_code == 0
    asked = {"name": "vqa", "question": "another?"}
    start, *rest = jobs.start_findings(job(made.path, output, tasks=[asked]))
    assert (start.status, rest) == ("problem", [])
    assert "these changed" in start.what
    assert "--overwrite" in start.remedy


def test_images_that_are_not_there(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"image": ["gone.png"] * 3})
    start, images = jobs.start_findings(job(manifest, tmp_path / "out"))
    assert (start.status, images.status) == ("ok", "problem")
    assert "0 of 3 sampled rows" in images.what
    assert "image_missing" in images.what


def test_an_endpoint_and_a_cluster_that_are_not_there(made: Quiz, tmp_path: Path) -> None:
    endpoint = {"name": "openai", "base_url": f"http://127.0.0.1:{CLOSED}/v1"}
    found = about(
        job(made.path, tmp_path / "out", engine=endpoint, ray_address=f"127.0.0.1:{CLOSED}")
    )
    assert "model" not in found
    assert found["engine"].status == "problem"
    assert f"127.0.0.1:{CLOSED}" in found["engine"].what
    assert found["cluster"].status == "problem"
    assert found["cluster"].remedy


@pytest.mark.parametrize(("limit", "status"), [(128, "problem"), (512, "warning")])
def test_a_low_limit_of_open_files(limit: int, status: str) -> None:
    program = (
        "from vlmbatch.doctor.machine import open_files as f; x = f(); print(x.status, x.remedy)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096)),
    )
    assert ended.stdout == f"{status} ulimit -n 4096\n"


@pytest.mark.parametrize(
    ("says", "status", "what"),
    [
        ("echo 'NVIDIA H200, 143771, 4, 580.1'", "ok", "NVIDIA H200, 143771 MiB; driver 580.1"),
        ("echo 'NVIDIA H200, 143771, 90000, 580.1'", "warning", "hold memory of 1"),
        ("echo 'no driver is loaded' >&2; exit 9", "problem", "no driver is loaded"),
    ],
)
def test_gpus_are_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, status: str, what: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = machine.gpus()
    assert found.status == status, found
    assert what in found.what
    assert bool(found.remedy) == (status != "ok")


def test_a_check_that_breaks_or_hangs_is_a_finding_too() -> None:
    never = threading.Event()

    def breaks() -> Finding:
        raise ZeroDivisionError("by nothing")

    def refuses() -> Finding:
        raise UsageError("not so", hint="but so")

    def hangs() -> Finding:
        never.wait()
        return ok("hangs", "")

    checks = [
        Check("breaks", breaks),
        Check("refuses", refuses),
        Check("hangs", hangs, 0.05),
        Check("must not hang", hangs, 0.05, needed=True),
        Check("fine", lambda: ok("fine", "yes")),
    ]
    found = findings_of(checks)
    never.set()
    assert [each.status for each in found] == ["warning", "problem", "warning", "problem", "ok"]
    assert "ZeroDivisionError: by nothing" in found[0].what
    assert (found[1].what, found[1].remedy) == ("not so", "but so")
    assert "no answer within" in found[2].what
    assert "2 problems" in describe(found)


def test_a_broken_library_stands_only_in_the_way_of_an_engine_that_needs_it() -> None:
    broken = Finding("torchvision", "problem", "cannot be imported")
    needed = [
        name
        for name in ("auto", "transformers", "vllm", "openai", "echo")
        if problems([machine.as_needed(broken, EngineSpec(name=name))])  # type: ignore[arg-type]
    ]
    assert needed == ["auto", "transformers", "vllm"]


def test_a_torch_that_cannot_be_imported_is_told_with_its_reason(tmp_path: Path) -> None:
    for name in ("torch", "torchvision"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('libcudart.so is missing')")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from vlmbatch.doctor.machine import torch, torchvision\n"
        "print(torch().status, torch().what); print(torchvision().status, torchvision().what)"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    torch, torchvision = ended.stdout.splitlines()
    assert torch.startswith("problem cannot be imported: ImportError: libcudart.so is missing")
    assert torchvision.startswith("problem cannot be imported, and so no image processor")
