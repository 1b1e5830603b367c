"""Families of transformers that answer in tokens of their own: real runs of tiny checkpoints."""

from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the transformers engine needs torch")
pytest.importorskip("transformers", reason="the transformers engine needs transformers")

from tests.families.native import Native, check
from tests.tiny_models import (
    build_florence2,
    build_fuyu,
    build_idefics3,
    build_kosmos2,
    build_paligemma,
)
from vlmbatch.records import TaskKind

SENTENCES = {
    "<CAPTION>": "What does the image describe?",
    "<OCR>": "What is the text in the image?",
    "<CAPTION_TO_PHRASE_GROUNDING>cup": "Locate the phrases in the caption: cup",
    "<OPEN_VOCABULARY_DETECTION>cup": "Locate cup in the image.",
}
"""What Florence-2's task tokens stand for (transformers 5.19, processing_florence2.py)."""
A_CUP = "<phrase>a red cup</phrase><object><patch_index_0044><patch_index_0863></object>"

NATIVES = {
    "kosmos2": Native(
        build_kosmos2, "kosmos2", {TaskKind.CAPTION: A_CUP}, prompt=lambda text: f"<s>{text}"
    ),
    "fuyu": Native(
        build_fuyu,
        "fuyu",
        prompt=lambda text: f"{text}<0x04>",
        decoded=lambda text: text.replace("<0x00>", "<0x00> "),
    ),
    "paligemma": Native(
        build_paligemma, "paligemma", prompt=lambda text: f"<bos>{text}\n", rate=5e-3
    ),
    "florence2": Native(
        build_florence2,
        "florence2",
        prompt=lambda text: f"<s>{SENTENCES[text]}</s>",
        rate=2.5e-3,
    ),
    "idefics3": Native(partial(build_idefics3, side=32, split=True), "idefics3"),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's
@pytest.mark.parametrize("name", NATIVES)
def test_what_it_was_taught_comes_out_of_a_run(name: str, tmp_path: Path) -> None:
    check(NATIVES[name], tmp_path)
