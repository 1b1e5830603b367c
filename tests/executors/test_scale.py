"""Memory is bounded by settings, not by the manifest: the short form of `make million`."""

from pathlib import Path

import pytest

from benchmarks.million_rows import measure, measure_s3

ROWS = 50_000


def test_fifty_thousand_rows_take_no_more_memory_than_ten_thousand(tmp_path: Path) -> None:
    figures = measure(tmp_path, ROWS, "--part-rows", "2048")
    assert figures["ok"] == figures["rows_in_parts"] == ROWS
    assert set(figures["peak_mb"]) == {"driver", "worker"}
    assert max(figures["peak_mb"].values()) < 700
    assert max(figures["growth_after_20_percent"].values()) <= 1.1, figures


@pytest.mark.slow
def test_a_manifest_and_an_output_on_s3_hold_every_row_once(tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    figures = measure_s3(tmp_path, 20_000, "--part-rows", "4096")
    assert figures["ok"] == figures["rows_in_parts"] == 20_000
    assert figures["parts"] == 5
    assert figures["objects_of_the_output"] < 12  # shards are gathered, and gone
    assert max(figures["peak_mb"].values()) < 700
