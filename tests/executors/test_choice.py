"""What a machine cannot give is refused before anything starts."""

from pathlib import Path

import pytest

from vlmbatch.errors import UsageError
from vlmbatch.executors.choice import check_executor, choose_executor, environment_of
from vlmbatch.job import EngineSpec, JobSpec


def test_an_engine_with_more_gpus_than_the_machine_has_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asks(gpus: int, **more: str) -> JobSpec:
        return JobSpec(manifest=["m.parquet"], gpus_per_worker=gpus, **more)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    check_executor(asks(2))
    with pytest.raises(UsageError, match="--gpus-per-worker 4: this machine has 2 usable GPUs"):
        check_executor(asks(4))
    check_executor(asks(4, ray_address="auto"))  # the cluster is asked itself
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_executor(asks(1))
    with pytest.raises(UsageError, match="this machine has 0 usable GPUs"):
        check_executor(asks(2))


FAMILY = """
from dataclasses import replace
from vlmbatch.families import entry_named
ENTRY = replace(entry_named("generic"), name="older", requirements=("transformers==4.37.2",))
"""


def test_a_family_with_requirements_takes_ray_and_only_with_transformers(tmp_path: Path) -> None:
    (tmp_path / "older.py").write_text(FAMILY)

    def asks(engine: str, **more: str) -> JobSpec:
        named = {"family": str(tmp_path / "older.py")} | more
        return JobSpec(manifest=["m.parquet"], workers=1, engine=EngineSpec(name=engine), **named)

    assert choose_executor(asks("transformers"), 5) == ("ray", 1)
    assert str(environment_of(asks("transformers"))) == "transformers==4.37.2"
    assert choose_executor(asks("transformers", executor="local"), 5) == ("local", 1)
    for job in (*map(asks, ("echo", "openai", "vllm")), asks("transformers", family="generic")):
        assert environment_of(job) is None
        assert choose_executor(job, 5) == ("local", 1)
