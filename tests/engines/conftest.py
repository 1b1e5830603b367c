"""One tiny checkpoint for all engine tests of a process."""

from pathlib import Path

import pytest

from tests.tiny_models import build_idefics3


@pytest.fixture(scope="session")
def tiny_idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an Idefics3 of random weights; see ``build_idefics3``."""
    return build_idefics3(tmp_path_factory.mktemp("models") / "tiny-idefics3")
