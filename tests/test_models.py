"""Resolving models: folders, and a Hub cache with its real layout in a temporary folder."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness import PATIENCE
from tests.tiny_models import build_idefics3
from vlmbatch.errors import UsageError
from vlmbatch.models import (
    EDGE,
    WHOLE_UP_TO,
    ModelNotFound,
    demo_path,
    folder_fingerprint,
    resolve_model,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "my-model")
    model = resolve_model(str(folder))
    assert (model.name, model.path) == (str(folder), str(folder))
    assert model.revision == f"xxh3:{folder_fingerprint(folder)}"
    assert len(model.revision) == len("xxh3:") + 32
    assert model.label == f"my-model@{model.revision[5:17]}"
    assert model.config == {"model_type": "tiny"}
    assert model.is_local


def test_a_folder_may_be_named_from_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "my-model")
    monkeypatch.chdir(folder)
    assert resolve_model(".").path == str(folder)
    assert resolve_model(".").label.startswith("my-model@")


def test_the_fingerprint_follows_what_decides_the_answers(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    before = folder_fingerprint(folder)
    assert folder_fingerprint(shutil.copytree(folder, tmp_path / "copy")) == before

    (folder / "README.md").write_text("about")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.json").write_text("{}")
    assert folder_fingerprint(folder) == before

    (folder / "weights.safetensors").write_bytes(b"other")
    changed = folder_fingerprint(folder)
    assert changed != before

    (folder / "weights.safetensors").rename(folder / "moved.safetensors")
    assert folder_fingerprint(folder) not in (before, changed)


def test_of_a_large_file_the_size_and_both_ends_count(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    large = folder / "weights.safetensors"
    size = WHOLE_UP_TO + 2 * EDGE

    def fingerprint_with(at: int | None = None, size: int = size) -> str:
        with large.open("wb") as stream:
            stream.truncate(size)  # a sparse file
            if at is not None:
                stream.seek(at)
                stream.write(b"x")
        return folder_fingerprint(folder)

    before = fingerprint_with()
    assert fingerprint_with(at=0) != before
    assert fingerprint_with(at=size - 1) != before
    assert fingerprint_with(size=size + 1) != before
    assert fingerprint_with(at=size // 2) == before


def test_a_folder_without_config_json_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"no config\.json .*\(it has: weights\.bin\)"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=str(tmp_path / "config.json")):
        resolve_model(str(tmp_path))


def test_a_missing_folder_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(ModelNotFound, match="no such model folder") as raised:
            resolve_model(name)
        assert raised.value.exit_code == 2
        assert raised.value.hint == "name a local model folder with -m, or -m demo"


def test_a_local_model_has_no_revisions(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.raises(UsageError, match="--revision main"):
        resolve_model(str(folder), "main")
    known = resolve_model(str(folder)).revision
    assert resolve_model(str(folder), known).revision == known


def test_demo_is_the_model_in_the_package() -> None:
    assert demo_path().parent.name == "vlmbatch"
    if not (demo_path() / "config.json").is_file():
        with pytest.raises(ModelNotFound, match="the demo model is missing"):
            resolve_model("demo")
        pytest.skip("the demo model is not in this checkout")
    model = resolve_model("demo")
    assert Path(model.path) == demo_path()
    assert model.label == f"demo@{model.revision[5:17]}"


def test_what_is_no_hub_id_is_said_so() -> None:
    with pytest.raises(ModelNotFound, match="neither a model folder nor a Hub id"):
        resolve_model("not an id")


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_hub_model_is_resolved_to_its_commit(
    hub_cache: Path, revision: str | None, offline: bool
) -> None:
    model = resolved(hub_cache, "acme/tiny", revision, offline=offline)
    assert model == {
        "path": "acme/tiny",
        "revision": COMMIT,
        "label": "acme/tiny@0123456789ab",
        "model_type": "idefics3",
    }


def test_without_a_network_an_unknown_model_is_refused_within_seconds(hub_cache: Path) -> None:
    said = resolved(hub_cache, "acme/other", "v1")
    assert said["seconds"] < 15
    assert said["error"].startswith(
        "model acme/other at revision v1 was not found: it is not in the local cache, "
        "and the Hub cannot be reached ("
    )
    assert said["hint"] == "name a local model folder with -m, or -m demo"


def test_offline_an_unknown_model_is_refused_without_asking(hub_cache: Path) -> None:
    said = resolved(hub_cache, "acme/other", None, offline=True)
    assert said["error"].endswith("not in the local cache, and the Hub is not asked offline")


def test_the_engine_loads_a_cached_hub_model_by_id_and_commit(hub_cache: Path) -> None:
    said = in_another_process(
        hub_cache,
        """
        import asyncio
        from tests.engines.test_transformers import ask, picture
        from vlmbatch.engines.transformers import TransformersEngine

        async def main():
            engine = TransformersEngine(model.path, revision=model.revision, device="cpu")
            await engine.start()
            completion = await engine.generate(ask("what?", picture(1)))
            await engine.close()
            print(json.dumps({"tokens": completion.completion_tokens}))

        model = resolve_model("acme/tiny")
        asyncio.run(main())
        """,
    )
    assert 1 <= said["tokens"] <= 8


def test_resolving_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    said = in_another_process(
        tmp_path,
        f"""
        import sys
        resolve_model({str(folder)!r})
        heavy = {{"torch", "transformers", "huggingface_hub"}} & set(sys.modules)
        print(json.dumps({{"heavy": sorted(heavy)}}))
        """,
    )
    assert said == {"heavy": []}


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub cache with one model, laid out as huggingface_hub does."""
    pytest.importorskip("transformers", reason="the model is built with transformers")
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--acme--tiny"
    build_idefics3(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return cache


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "weights.safetensors").write_bytes(b"weights")
    return folder


def resolved(
    cache: Path, name: str, revision: str | None, *, offline: bool = False
) -> dict[str, Any]:
    """What resolve_model says in a process with this cache, which may use the network."""
    return in_another_process(
        cache,
        f"""
        import huggingface_hub, time
        began = time.monotonic()
        try:
            model = resolve_model({name!r}, {revision!r}, offline={offline})
        except ModelNotFound as error:
            told = {{"error": error.message, "hint": error.hint}}
            print(json.dumps(told | {{"seconds": time.monotonic() - began}}))
        else:
            said = {{"path": model.path, "revision": model.revision, "label": model.label}}
            print(json.dumps(said | {{"model_type": model.config["model_type"]}}))
        """,
    )


def in_another_process(cache: Path, code: str) -> dict[str, Any]:
    """What the code prints as JSON. The Hub library reads its settings when it is imported."""
    imports = "import json\nfrom vlmbatch.models import ModelNotFound, resolve_model\n"
    environment = {**os.environ, "HF_HUB_CACHE": str(cache)}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", imports + textwrap.dedent(code)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize(("revision", "runs"), [(None, False), ("main", False), (COMMIT, True)])
def test_code_of_the_hub_runs_only_at_a_pinned_commit(
    hub_cache: Path, tmp_path: Path, revision: str | None, runs: bool
) -> None:
    manifest = tmp_path / "m.parquet"
    pq.write_table(pa.table({"image": ["a.png"]}), manifest)
    job = {
        "manifest": str(manifest),
        "model": "acme/tiny",
        "trust_remote_code": True,
        **({"revision": revision} if revision else {}),
    }
    said = in_another_process(
        hub_cache,
        f"""
        from vlmbatch.errors import UsageError
        from vlmbatch.job import spec_from
        from vlmbatch.manifest import open_manifest
        from vlmbatch.resolve import resolve

        try:
            resolve(spec_from({job!r}, where="here"), open_manifest([{str(manifest)!r}]), None)
            print("{{}}")
        except UsageError as error:
            print(json.dumps({{"hint": error.hint}}))
        """,
    )
    assert said == {} if runs else f"--revision {COMMIT}" in said["hint"]
