"""Words to the person at the terminal: news on stderr, and a stdout that holds only the summary."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from vlmbatch.placeholders import hidden
from vlmbatch.results.store import reported


def say(text: str) -> None:
    """One line on stderr; what variables of the job spec hold stands there by their names."""
    with contextlib.suppress(OSError):  # who closed stderr does not want to read
        print(hidden(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def stdout_to(path: Path) -> Iterator[None]:
    """Descriptor 1 of this process and its children goes to a log, so that what an engine or Ray
    prints never mixes with the summary."""
    sys.stdout.flush()
    real = os.dup(1)
    with reported(path), open(path, "ab") as log_file:
        os.dup2(log_file.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)
