"""What is wrong with vLLM's arguments is said before anything runs, vLLM installed or not."""

import json
from pathlib import Path

import pytest

from vlmbatch.engines import asked_settings, check_engine
from vlmbatch.engines.vllm_args import lora_rank
from vlmbatch.errors import UsageError
from vlmbatch.job import EngineSpec


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("dtype", "--dtype"),
        ("max-model-len", "--max-model-len"),
        ("tensor_parallel_size", "--gpus-per-worker"),
        ("enable_lora", "--lora"),
    ],
)
def test_an_argument_with_an_option_of_its_own_names_it(key: str, meant: str) -> None:
    with pytest.raises(UsageError) as raised:
        check_engine(EngineSpec(name="vllm", args={key: "1"}))
    assert raised.value.hint == f"give {meant}"


def test_a_token_is_not_taken_as_an_argument() -> None:
    with pytest.raises(UsageError, match="HF_TOKEN") as raised:
        check_engine(EngineSpec(name="vllm", args={"hf_token": "hf_secret"}))
    assert "hf_secret" not in str(raised.value)


def test_a_setting_of_another_engine_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-num-seqs is a setting of the vllm engine"):
        check_engine(EngineSpec(name="transformers", max_num_seqs=8))
    with pytest.raises(UsageError, match="--batch-size is a setting of the transformers engine"):
        check_engine(EngineSpec(name="vllm", batch_size=8))
    check_engine(EngineSpec(name="vllm", max_num_seqs=8, dtype="bfloat16"))


def test_what_may_change_answers_is_part_of_what_is_asked() -> None:
    def asked(**settings: object) -> object:
        return asked_settings(EngineSpec(name="vllm", **settings))

    assert asked() == asked(max_num_seqs=8, gpu_memory_utilization=0.5)
    assert asked() == asked(args={"enforce_eager": "true", "block_size": "32"})
    assert asked() == asked(args={"enforce-eager": "true"})
    assert asked(args={"mm-processor-kwargs": "{}"}) == asked(args={"mm_processor_kwargs": "{}"})
    for change in (
        {"max_model_len": 512},
        {"quantization": "fp8"},
        {"kv_cache_dtype": "fp8"},
        {"dtype": "float16"},
        {"args": {"mm_processor_kwargs": '{"num_crops": 4}'}},
    ):
        assert asked() != asked(**change)


def test_an_adapter_is_known_by_its_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no adapter: its adapter_config.json cannot be read"):
        check_engine(EngineSpec(name="vllm", lora=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 12}))
    check_engine(EngineSpec(name="vllm", lora=str(tmp_path)))
    assert lora_rank(str(tmp_path)) == 16
