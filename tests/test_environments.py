"""Environments of their own, built by the real pip: from an index of small wheels on loopback that
can be held up, and one with a real older transformers, in which a checkpoint's own code answers."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.harness import PATIENCE, until, write_manifest
from vlmbatch.environments import Environment, facts_of, key_of
from vlmbatch.errors import RunStopped

BUILD = """
import sys
from vlmbatch.environments import Environment
from vlmbatch.terminal import say
print(Environment(tuple(sys.argv[1:])).ensure(say).python)
"""
OLDER = "transformers==4.46.3"


class Index:
    """A package index on loopback. While it is held up, no wheel comes."""

    def __init__(self, *wheels: tuple[str, bytes]) -> None:
        self.wheels = dict(wheels)
        self.asked: list[str] = []
        """The wheels that were asked for, in order."""
        self.open = threading.Event()
        self.open.set()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/simple"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        *_, package, file = request.path.split("/")
        body = self.wheels.get(file)
        if body is not None:
            self.asked.append(file)
            self.open.wait(PATIENCE)
        else:
            ours = package.replace("-", "_")
            files = [name for name in self.wheels if name.startswith(f"{ours}-")]
            body = "".join(f'<a href="{name}">{name}</a>\n' for name in files).encode()
        request.send_response(200 if body else 404)
        request.send_header("Content-Type", "text/html")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def close(self) -> None:
        self.open.set()
        self._server.shutdown()
        self._server.server_close()


def wheel(name: str, version: str, *needs: str) -> tuple[str, bytes]:
    """A wheel with one module that knows its version."""
    file, info = io.BytesIO(), f"{name}-{version}.dist-info"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n")
        made.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *metadata, ""]))
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", "")
    return f"{name}-{version}-py3-none-any.whl", file.getvalue()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """All that pip has; ``aaa`` wants a huggingface_hub that no transformers of ours takes."""
    made = Index(
        wheel("aaa", "1.0", "huggingface_hub<0.1", "tqdm", "aab"),
        wheel("aab", "2.0"),
        wheel("huggingface_hub", "0.0.7"),
        wheel("ray", "0.1"),
        wheel("wants_other_ray", "1.0", "ray<1"),
        wheel("pyarrow", "1000.0"),
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", made.url)
    monkeypatch.setenv("VLMBATCH_CACHE", str(tmp_path / "the cache"))
    yield made
    made.close()


def build(*requirements: str) -> tuple[str, list[str]]:
    """The environment's Python, and what was said."""
    said: list[str] = []
    return Environment(requirements).ensure(said.append).python, said


def printed(python: str | Path, code: str, **environ: str) -> Any:
    """What an expression is there."""
    modules = "importlib.metadata as metadata, importlib.util, json, huggingface_hub"
    ended = subprocess.run(
        [python, "-c", f"import {modules}; print(json.dumps({code}))"],
        env=os.environ | environ,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def site_packages(python: str | Path) -> Path:
    (found,) = Path(python).parent.parent.glob("lib/python*/site-packages")
    return found


# what is in one


def test_only_what_differs_is_installed_and_the_rest_is_the_installation_beneath(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = "[importlib.util.find_spec(n).origin for n in ('numpy', 'ray', 'torch', 'vlmbatch')]"
    ours = printed(sys.executable, files)
    hub = "[huggingface_hub.__version__, metadata.version('huggingface_hub')]"
    our_hub = printed(sys.executable, hub)

    python, said = build("aaa==1.0")

    assert len(said) == 2, said
    assert said[0].startswith("building an environment with aaa==1.0, once per machine (log: ")
    assert "built in" in said[1]
    assert {path.stem for path in site_packages(python).glob("*.dist-info")} == {
        *("aaa-1.0", "aab-2.0", "huggingface_hub-0.0.7")
    }
    assert printed(python, files) == ours
    assert printed(python, hub) == ["0.0.7"] * 2
    assert printed(sys.executable, hub) == our_hub
    beneath = os.pathsep.join(
        [str(site_packages(sys.executable)), os.environ.get("PYTHONPATH", "")]
    )
    assert printed(python, hub, PYTHONPATH=beneath) == ["0.0.7"] * 2  # as some clusters set it
    assert build("aaa==1.0") == (python, [])


def test_another_ray_than_the_cluster_s_and_what_vlmbatch_cannot_take_are_refused(
    index: Index,
) -> None:
    with pytest.raises(RunStopped, match="built: ERROR: Cannot install wants"):
        build("wants_other_ray")
    log = Environment(("wants_other_ray",)).log.read_text()
    assert f"The user requested (constraint) ray=={facts_of(())['ray']}" in log
    with pytest.raises(RunStopped, match=r"pyarrow==1000\.0 can be built: \w+Error: "):
        build("pyarrow==1000.0")  # it is installed, and then no worker can be imported


def test_a_requirement_that_does_not_exist_and_an_index_that_is_not_there_are_told_apart(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunStopped) as unknown:
        build("aaa==9.9")
    assert str(unknown.value).startswith(
        "no environment with aaa==9.9 can be built: "
        "ERROR: No matching distribution found for aaa==9.9\n  -> the whole log is "
    )
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(RunStopped, match="-> pip reaches no package index from here"):
        build("aaa==1.0")


def test_every_fact_that_matters_makes_another_environment() -> None:
    facts = facts_of(("aaa==1.0",))
    assert set(facts) == {"requirements", "python", "ray", "vlmbatch", "beneath"}
    assert key_of(facts) == key_of(dict(reversed(facts.items())))
    keys = {key_of(facts | {name: f"another {name}"}) for name in facts} | {key_of(facts)}
    assert len(keys) == 1 + len(facts)
    assert Environment(("a==1", "b==1")).folder != Environment(("a==1", "b==2")).folder


# several processes


class Builder:
    """A process that builds; ended with the block."""

    def __init__(self, folder: Path, *requirements: str) -> None:
        self._said = folder / f"{len(list(folder.iterdir()))}.log"
        with open(self._said, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BUILD, *requirements],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def said(self) -> str:
        return self._said.read_text()

    def until(self, text: str) -> None:
        until(lambda: text in self.said, f"{text!r} in {self._said}")


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def test_of_two_processes_at_once_one_builds_and_the_other_waits_and_says_so(
    index: Index, logs: Path
) -> None:
    index.open.clear()
    with Builder(logs, "aab") as first, Builder(logs, "aab") as second:
        both = (first, second)
        until(lambda: any("waiting" in one.said for one in both), "one waits")
        until(lambda: index.asked, "pip wants its wheel")
        index.open.set()
        assert [one.process.wait(PATIENCE) for one in both] == [0, 0], (first.said, second.said)
    assert index.asked == ["aab-2.0-py3-none-any.whl"]
    assert sorted("building an environment" in one.said for one in both) == [False, True]
    python, said = build("aab")
    assert said == []
    assert [one.said.splitlines()[-1] for one in both] == [python] * 2


def test_a_build_that_was_killed_is_done_anew_after_what_is_left_of_it_has_ended(
    index: Index, logs: Path
) -> None:
    index.open.clear()
    with Builder(logs, "aab") as first:
        until(lambda: index.asked, "pip wants its wheel")
        first.process.kill()  # pip lives on
        first.process.wait()
        (folder,) = (
            path for path in Environment(("aab",)).folder.parent.iterdir() if path.is_dir()
        )
        (folder / "left behind").touch()
        with Builder(logs, "aab") as second:
            second.until("waiting")
            assert len(index.asked) == 1
            index.open.set()
            assert second.process.wait(PATIENCE) == 0, second.said
    assert len(index.asked) == 2
    assert not (folder / "left behind").exists()
    python, said = build("aab")
    assert said == []
    assert printed(python, "metadata.version('aab')") == "2.0"


@pytest.mark.slow
def test_where_the_installation_beneath_has_changed_pip_looks_again_and_needs_no_network(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installation beneath is itself such an environment here."""
    beneath, _ = build("aab")

    def build_over_it() -> tuple[str, str]:
        ended = subprocess.run(
            [beneath, "-c", BUILD, "aaa==1.0"], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip(), ended.stderr

    python, said = build_over_it()
    assert "building" in said
    assert not list(site_packages(python).glob("aab*"))
    assert build_over_it() == (python, "")
    (site_packages(beneath) / "aab-2.0.dist-info").rename(
        site_packages(beneath) / "aab-2.1.dist-info"
    )
    asked = list(index.asked)
    again, said = build_over_it()
    assert again == python
    assert "building" in said
    assert index.asked == asked


# a checkpoint's own code in one

FAMILY = """
from vlmbatch.families.base import TEXT_TASKS, Chat, Entry

class NeedsOlder(Chat):
    name = "needs_older"

ENTRY = Entry(
    name="needs_older",
    checkpoints=(),
    tasks=TEXT_TASKS,
    boxes="",
    evidence="run",
    matches=lambda config, name: False,
    make=lambda config: NeedsOlder(),
    own_code=True,
    requirements=({requirement!r},),
)
"""
ONLY_IN_4 = "from transformers.pytorch_utils import find_pruneable_heads_and_indices  # noqa: F401"


class OwnCode:
    """A checkpoint whose code needs what is not installed, its family, and where both are asked."""

    def __init__(self, folder: Path, requirement: str, needs: str = ONLY_IN_4) -> None:
        import torch
        from safetensors.torch import save_file

        self.folder = folder
        self.cache = folder / "the cache"
        checkpoint = shutil.copytree(Path(__file__).parent / "needs_older", folder / "a model")
        code = checkpoint / "modeling_needs_older.py"
        assert ONLY_IN_4 in code.read_text()
        code.write_text(code.read_text().replace(ONLY_IN_4, needs))
        weights = {"weight": torch.tensor([7.0])}
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
        (folder / "family.py").write_text(FAMILY.format(requirement=requirement))
        write_manifest(folder / "manifest.parquet", {"id": ["a", "b", "c"]})

    @property
    def environments(self) -> list[Path]:
        return list((self.cache / "environments").glob("*/"))

    def ask(self, executor: str, family: str = "family.py") -> tuple[int, list[str], str]:
        """The exit code, the answers, and what was said."""
        output = self.folder / f"{executor} {family}"
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "vlmbatch", "run", "manifest.parquet", "-o", str(output)),
                *("-t", "caption", "-m", "a model", "--trust-remote-code", "--family", family),
                *("--executor", executor, "--max-tokens", "500"),
            ],
            cwd=self.folder,
            env=os.environ | {"VLMBATCH_CACHE": str(self.cache)},
            capture_output=True,
            text=True,
            check=False,
        )
        parts = sorted(output.glob("part-*.parquet"))
        texts = [text for part in parts for text in pq.read_table(part)["text"].to_pylist()]
        return ended.returncode, texts, ended.stderr


def needs(executor: str, requirement: str) -> str:
    return (
        f"executor {executor}: family needs_older needs {requirement}, "
        "in an environment of its own\n"
    )


def test_own_code_is_answered_in_an_environment_that_ray_builds_and_the_next_run_finds(
    index: Index, tmp_path: Path
) -> None:
    own = OwnCode(tmp_path, "aab==2.0", needs="import aab")

    code, texts, said = own.ask("auto")

    assert code == 0, said
    assert needs("ray", "aab==2.0") in said
    assert "building an environment with aab==2.0, once per machine (log: " in said
    (folder,) = own.environments
    stamp = json.loads((folder / "complete.json").read_text())
    assert f"built in {stamp['seconds']:.0f} s, {stamp['size'] / 1e6:.0f} MB, in {folder}" in said
    assert len(texts) == 3
    assert all(text.endswith(f" in {folder}, 7.0") for text in texts), texts

    code, again, said = own.ask("local")

    assert (code, again) == (0, texts), said
    assert needs("local", "aab==2.0") in said
    assert "building" not in said
    assert index.asked == ["aab-2.0-py3-none-any.whl"]


def test_an_environment_that_cannot_be_built_stops_the_run_and_says_why(
    index: Index, tmp_path: Path
) -> None:
    own = OwnCode(tmp_path, "aab==9.9", needs="import aab")
    for executor in ("ray", "local"):
        code, texts, said = own.ask(executor)
        assert (code, texts) == (1, []), said
        assert "Error: no environment with aab==9.9 can be built: ERROR: No matching" in said
        assert f"  -> the whole log is {own.cache}/environments/" in said
        assert "Traceback" not in said


@pytest.mark.consumers
@pytest.mark.timeout(900)
def test_code_that_needs_an_older_transformers_answers_in_one_that_has_it(tmp_path: Path) -> None:
    import torch
    import transformers

    own = OwnCode(tmp_path, OLDER)
    code, texts, said = own.ask("local", "generic")
    assert (code, texts) == (1, []), said
    assert "cannot import name 'find_pruneable_heads_and_indices'" in said

    code, texts, said = own.ask("auto")
    if "pip reaches no package index" in said:
        pytest.skip(f"pip reaches no package index that has {OLDER}")
    assert code == 0, said
    assert needs("ray", OLDER) in said
    (folder,) = own.environments
    assert len(texts) == 3
    for text in texts:
        assert text.startswith("transformers 4.46.3, huggingface_hub 0."), text
        assert text.endswith(f", torch {torch.__version__} in {folder}, 7.0"), text
    assert transformers.__version__.startswith("5.")

    for executor in ("ray", "local"):
        code, again, said = own.ask(executor)
        assert (code, again) == (0, texts), said
        assert "building" not in said
