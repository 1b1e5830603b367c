"""What is installed here, and what the machine has, whatever the job."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import vlmbatch
from vlmbatch.doctor.findings import Check, Finding, ok, problem, warning
from vlmbatch.doctor.places import GIB, room, temporary_folder
from vlmbatch.engines import vllm_probe
from vlmbatch.executors.choice import usable_gpus
from vlmbatch.job import EngineSpec

IMPORT_SECONDS = 120.0
HUB_SECONDS = 5.0
FEW_FILES, FILES = 256, 1024
SHARED_MEMORY = GIB
ENGINES_THAT_NEED = {
    "torch": ("auto", "transformers", "vllm"),
    "torchvision": ("auto", "transformers", "vllm"),
    "vllm": ("vllm",),
    "gpus": ("vllm",),
}
INSTALL = "pip install 'vlmbatch[transformers]'"

_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "built_for": torch.version.cuda and "CUDA " + torch.version.cuda
        or getattr(torch.version, "hip", None) and "ROCm " + torch.version.hip or "the CPU",
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda else ["MPS"] if torch.backends.mps.is_available() else [],
}))
"""
_TORCHVISION = "import json, torchvision; print(json.dumps(torchvision.__version__))"


def checks() -> list[Check]:
    return [
        Check("python", python),
        Check("vlmbatch", installed),
        Check("torch", torch, IMPORT_SECONDS),
        Check("transformers", transformers),
        Check("torchvision", torchvision, IMPORT_SECONDS),
        Check("vllm", vllm, vllm_probe.PROBE_SECONDS),
        Check("ray", ray),
        Check("gpus", gpus),
        Check("open files", open_files),
        Check("shared memory", shared_memory),
        Check("temporary folder", temporary_folder, needed=True),
        Check("hub", hub),
        Check("model cache", cache),
    ]


def as_needed(finding: Finding, engine: EngineSpec) -> Finding:
    """A library that is broken is no problem of a job whose engine does not need it."""
    if finding.status != "problem" or finding.name not in ENGINES_THAT_NEED:
        return finding
    asked = "openai" if engine.name == "auto" and engine.base_url else engine.name
    return (
        finding if asked in ENGINES_THAT_NEED[finding.name] else replace(finding, status="warning")
    )


def python() -> Finding:
    machine = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return ok("python", f"{platform.python_version()} ({sys.executable}), {machine}")


def installed() -> Finding:
    where = Path(vlmbatch.__file__).parent
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ok("vlmbatch", f"{vlmbatch.__version__} ({where}), {cores} CPU cores")


def torch() -> Finding:
    """Imported in a process of its own: it takes seconds, and hundreds of megabytes."""
    name, here = "torch", usable_gpus()
    if find_spec("torch") is None:
        return warning(name, "not installed: the transformers engine needs it", INSTALL)
    said = _ask(_TORCH)
    if isinstance(said, str):
        return problem(name, f"cannot be imported: {said}", "install it again")
    devices = ", ".join(said["devices"])
    what = f"{said['version']}, for {said['built_for']}, {devices or 'no GPU'}"
    if here and not devices:
        how = "the build for CUDA" if said["built_for"] == "the CPU" else "a newer driver"
        return problem(name, f"{what}; this machine has {here}", f"install {how}")
    return ok(name, what)


def transformers() -> Finding:
    if find_spec("transformers") is None:
        return warning("transformers", "not installed: its engine cannot run", INSTALL)
    return ok("transformers", metadata.version("transformers"))


def torchvision() -> Finding:
    """One that does not fit torch breaks every processor of transformers; without it many work."""
    name = "torchvision"
    if find_spec(name) is None:
        return warning(
            name,
            "not installed: the image processors of many models need it",
            f"pip install {name}",
        )
    said = _ask(_TORCHVISION)
    if isinstance(said, list):
        return ok(name, said[0])
    return problem(
        name,
        f"cannot be imported, and so no image processor of transformers: {said}",
        "install the build that belongs to this torch, from the same index, or uninstall it",
    )


def vllm() -> Finding:
    if not vllm_probe.is_installed():
        if usable_gpus():
            return warning(
                "vllm", "not installed: on GPUs it is faster", "pip install 'vlmbatch[vllm]'"
            )
        return ok("vllm", "not installed")
    found = vllm_probe.probe()
    if found.problem is not None:
        return problem("vllm", found.problem, "install it for this machine, or uninstall it")
    return ok("vllm", f"{found.version}, on {found.device}")


def ray() -> Finding:
    return ok("ray", metadata.version("ray"))


def gpus() -> Finding:
    name, here = "gpus", usable_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None:
        return ok(name, "none of NVIDIA's" if not here else f"{here}, without nvidia-smi")
    fields = "name,memory.total,memory.used,driver_version"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=20,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        return problem(name, f"nvidia-smi says: {said[-1]}", "install or load NVIDIA's driver")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    limited = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    shown = [f"{row[0]}, {row[1]} MiB" for row in rows]
    what = f"{'; '.join(shown)}; driver {rows[0][3]}{limited}" if rows else "none"
    busy = [row for row in rows if row[2].isdigit() and int(row[2]) > int(row[1]) / 10]
    if busy:
        others = f"{what}; other programs hold memory of {len(busy)}"
        return warning(name, others, "end them, or lower --gpu-memory-utilization")
    return ok(name, what)


def open_files() -> Finding:
    """Connections, files of the manifest and pipes of workers each take one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        return ok("open files", f"at most {'any' if soft < 0 else f'{soft:,}'}")
    most = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    how = f"ulimit -n {most}" if most > soft else "have the hard limit raised (limits.conf)"
    make = problem if soft < FEW_FILES else warning
    return make("open files", f"at most {soft:,}, a run wants {FILES:,}", how)


def shared_memory() -> Finding:
    """Ray's objects and vLLM's messages between GPUs go through it."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return ok("shared memory", "no /dev/shm here")
    size = shutil.disk_usage(folder).total
    what = f"{size / GIB:,.1f} GiB in {folder}"
    if size < SHARED_MEMORY:
        how = "in a container: docker run --shm-size=8g, or an emptyDir of medium Memory"
        return warning("shared memory", what, how)
    return ok("shared memory", what)


def hub() -> Finding:
    name, address = "hub", os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if find_spec("huggingface_hub") is None:
        return warning(name, "huggingface_hub is not installed", "pip install 'vlmbatch[hub]'")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return ok(name, "HF_HUB_OFFLINE is set: models come from the cache alone")
    try:
        with urllib.request.urlopen(address, timeout=HUB_SECONDS):
            return ok(name, f"{address} answers")
    except urllib.error.HTTPError as error:
        return ok(name, f"{address} answers ({error.code})")
    except OSError as error:
        return warning(
            name,
            f"{address} cannot be reached ({error}): models must be local, or in the cache",
            "HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror; HF_HUB_OFFLINE=1 spares the waiting",
        )


def cache() -> Finding:
    if find_spec("huggingface_hub") is None:
        return ok("model cache", "none without huggingface_hub")
    from huggingface_hub.constants import HF_HUB_CACHE

    found = room("model cache", Path(HF_HUB_CACHE).absolute(), 10 * GIB, "HF_HOME names another")
    if found.status == "problem":  # what is in it can be read
        return warning(found.name, found.what, found.remedy)
    return found


def _ask(program: str) -> Any:
    """What a Python process prints as JSON (text in a list), or why it prints nothing: text."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS - 5,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {IMPORT_SECONDS - 5:.0f} s"
    if done.returncode:
        return next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
    value = json.loads(done.stdout.strip().splitlines()[-1])
    return [value] if isinstance(value, str) else value
