"""Families of transformers that are asked by a chat template: real runs of tiny checkpoints."""

from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the transformers engine needs torch")
pytest.importorskip("transformers", reason="the transformers engine needs transformers")

from tests.families.native import Native, check
from tests.tiny_models import (
    build_aya_vision,
    build_deepseek_vl,
    build_deepseek_vl_hybrid,
    build_gemma3,
    build_llava,
    build_llava_next,
    build_mllama,
)
from vlmbatch.records import TaskKind

GOES_ON = {TaskKind.CAPTION: "a red cup\n\nUser: how many?"}
"""An answer that goes on with a turn of the user's."""


def with_marks(text: str) -> str:
    """Gemma 3 writes its image tokens between marks and empty lines."""
    image = "<start_of_image><image_soft_token><end_of_image>"
    return text.replace("<start_of_image>", f"\n\n{image}\n\n")


NATIVES = {
    "llava": Native(build_llava, "llava"),
    "llava without a template": Native(partial(build_llava, chat_template=None), "llava"),
    "llava_next": Native(build_llava_next, "llava_next"),
    "llava_next on mistral": Native(partial(build_llava_next, mistral=True), "llava_next"),
    "deepseek_vl": Native(build_deepseek_vl, "deepseek_vl", GOES_ON),
    "deepseek_vl_hybrid": Native(build_deepseek_vl_hybrid, "deepseek_vl", GOES_ON),
    "gemma3": Native(build_gemma3, "gemma3", prompt=with_marks),
    "aya_vision": Native(build_aya_vision, "aya_vision"),
    "mllama": Native(build_mllama, "llama3_2_vision"),
}
VARIANTS = ("llava without a template", "llava_next on mistral", "deepseek_vl_hybrid")
"""Mostly what another one is."""


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in NATIVES],
)
def test_what_it_was_taught_comes_out_of_a_run(name: str, tmp_path: Path) -> None:
    check(NATIVES[name], tmp_path)
