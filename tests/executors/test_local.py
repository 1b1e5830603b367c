"""The local executor, with a worker process that says what is no message."""

import sys
from pathlib import Path

import pytest

from tests.harness import PATIENCE
from vlmbatch.executors import Died, Placed, Said
from vlmbatch.executors.local import LocalExecutor
from vlmbatch.messages import Broken, Setup


@pytest.mark.parametrize("line", ["nonsense", '{"type": "nonsense"}', '{"type": "ready"}', "[1]"])
def test_a_worker_that_says_what_cannot_be_read_is_ended_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    worker = tmp_path / "python"
    worker.write_text(f"#!/bin/bash\necho '{line}' >&$4\nexec sleep 60\n")
    worker.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(worker))
    executor = LocalExecutor(tmp_path)
    executor.start(Setup("out", "w1", 1, "nonce", "1"))
    events = [executor.events.get(timeout=PATIENCE) for _ in range(3)]
    executor.close()
    said, died = (event for event in events if not isinstance(event, Placed))
    assert isinstance(said, Said)
    assert isinstance(died, Died)
    assert isinstance(said.message, Broken)
    assert said.message.fatal
    assert "cannot read" in said.message.message
