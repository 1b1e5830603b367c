"""What a machine cannot give is refused before anything starts."""

import pytest

from vlmbatch.errors import UsageError
from vlmbatch.executors.choice import check_executor
from vlmbatch.job import JobSpec


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
