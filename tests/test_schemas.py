"""schemas/ is what the code says now."""

from pathlib import Path

import pytest

from vlmbatch.schemas import contracts

FOLDER = Path(__file__).parents[1] / "schemas"


@pytest.mark.parametrize("name", sorted(contracts()))
def test_committed_schema_is_current(name: str) -> None:
    assert (FOLDER / name).read_text() == contracts()[name], "run `make schemas`"


def test_folder_holds_nothing_else() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(contracts())
