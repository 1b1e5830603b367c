"""`vlmbatch models`, and what a family is not asked for."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from vlmbatch.catalogue import describe_families, describe_model
from vlmbatch.cli import main
from vlmbatch.engines.transformers_probe import image_text_classes
from vlmbatch.errors import UsageError
from vlmbatch.families import FAMILIES, family_for
from vlmbatch.images.load import ImageLoader, ImageMemory, Limits
from vlmbatch.job import JobSpec, TaskSpec
from vlmbatch.manifest import open_manifest
from vlmbatch.records import ImageRef
from vlmbatch.resolve import asking_of


def model_folder(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_all_families_are_listed_with_what_is_known_of_them() -> None:
    result = CliRunner().invoke(main, ["models", "--json"])
    assert result.exit_code == 0, result.output
    listed = {item["family"]: item for item in json.loads(result.output)}
    assert tuple(listed) == FAMILIES
    assert listed["kosmos2"]["tasks"] == "caption, vqa, ground"
    assert listed["paligemma"]["evidence"] == "documented"
    assert listed["demo"]["evidence"] == "run"
    assert all(item["boxes"] for item in listed.values())
    plain = CliRunner().invoke(main, ["models"])
    assert plain.exit_code == 0, plain.output
    assert "family:       kosmos2\n" in plain.output


def test_transformers_registry_is_read_without_importing_it() -> None:
    pytest.importorskip("transformers", reason="it reads the registry of transformers")
    assert {"kosmos-2", "fuyu", "florence2", "paligemma", "llava_next"} <= set(image_text_classes())
    code = (
        "import sys\nfrom vlmbatch.catalogue import describe_families\ndescribe_families()\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_registry_agrees_with_the_library() -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    assert image_text_classes() == dict(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    types = {item["family"]: item["transformers"] for item in describe_families()}
    assert types["deepseek_vl"] == "deepseek_vl, deepseek_vl_hybrid"
    assert types["generic"] == "any"


def test_a_model_is_told_its_exact_prompts_and_its_costs(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "pg", model_type="paligemma")
    result = CliRunner().invoke(main, ["models", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["family"], found["prompt_form"]) == ("paligemma", "whole")
    assert found["prompts"]["detect"] == "<image>detect {label} ; {label}"
    assert found["image_tokens"] == {"640x480": 256, "1920x1080": 256}
    assert found["engines"]["transformers"] in ("yes", "not installed")
    plain = CliRunner().invoke(main, ["models", str(folder)])
    assert "  vqa:               <image>answer en {question}\n" in plain.output


def test_the_name_of_the_folder_counts_where_the_config_does_not_tell(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "deepseek-vl-1.3b-base", model_type="deepseek_vl")
    chat = model_folder(tmp_path / "deepseek-vl-1.3b-chat", model_type="deepseek_vl")
    assert describe_model(str(base))["family"] == "deepseek_vl_base"
    assert describe_model(str(chat))["family"] == "deepseek_vl"
    assert set(describe_model(str(chat))["prompts"]) == {
        "caption",
        "caption, detailed",
        "vqa",
        "ocr",
    }


@pytest.mark.parametrize(
    ("family", "task", "refused"),
    [
        ("kosmos2", TaskSpec(name="detect", labels=["a"]), True),
        ("kosmos2", TaskSpec(name="ground", phrase="a"), False),
        ("florence2", TaskSpec(name="vqa", question="a?"), True),
        ("florence2", TaskSpec(name="vqa", question="a?", prompt="<CAPTION>"), False),
        ("aya_vision", TaskSpec(name="ground", phrase="a"), True),
        ("aya_vision", TaskSpec(name="ground", phrase="a", prompt="where?"), True),
        ("aya_vision", TaskSpec(name="mine", prompt="what?"), False),
        ("llava", TaskSpec(name="detect", labels=["a"], prompt="where is a?"), False),
        ("generic", TaskSpec(name="detect", labels=["a"]), False),
    ],
)
def test_a_family_is_not_asked_what_it_was_not_trained_for(
    tmp_path: Path, family: str, task: TaskSpec, refused: bool
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": ["a.png"]}), tmp_path / "m.parquet")
    manifest = open_manifest([str(tmp_path / "m.parquet")])
    job = JobSpec(manifest=str(tmp_path / "m.parquet"), output="out", tasks=[task], family=family)
    if not refused:
        assert asking_of(job, manifest, {}).family.name == family
        return
    with pytest.raises(UsageError, match=f"-t {task.name} is nothing that models of") as caught:
        asking_of(job, manifest, {})
    assert caught.value.hint is not None
    assert "--family generic" in caught.value.hint


async def _loaded(path: Path, family: str) -> tuple[int, int]:
    chosen = family_for({}, family)
    with ThreadPoolExecutor(1) as threads:
        loader = ImageLoader(
            base=str(path.parent),
            memory=ImageMemory(2**20),
            executor=threads,
            limits=Limits(),
            target=chosen.target,
            prepare=chosen.prepare,
        )
        with await loader.load([ImageRef(uri=path.name)]) as loaded:
            (image,) = loaded.images
            assert (image.size.width, image.size.height) == (100, 50)
            return image.pixels.size


def test_the_loader_gives_the_model_what_its_family_prepares(tmp_path: Path) -> None:
    import asyncio

    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    assert asyncio.run(_loaded(tmp_path / "a.png", "llava")) == (100, 100)
    assert asyncio.run(_loaded(tmp_path / "a.png", "llava_next")) == (100, 50)
