"""Broken Parquet files of a stranger: an error, or failed rows; never a crash, never a hang."""

import re
import subprocess
import sys

import pytest

from tests.harness import PATIENCE


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_500_broken_files_end_no_process(first, tmp_path):
    words = [
        sys.executable,
        "-m",
        "tests.manifest.fuzz",
        str(tmp_path),
        str(first),
        f"{first + 500}",
    ]
    found = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    lines = found.stdout.splitlines()
    assert found.returncode == 0, (lines[-1:], found.stderr[-2000:])
    assert [int(line.split()[0]) for line in lines] == list(range(first, first + 500))
    outcomes = [line.partition(" ")[2] for line in lines]
    assert all(re.fullmatch(r"error|rows \d+ failed \d+", each) for each in outcomes), outcomes
    assert 50 < sum(each != "error" for each in outcomes) < 450  # the mutations are neither all
