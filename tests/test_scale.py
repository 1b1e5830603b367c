"""Memory is bounded by settings, not by the manifest: the short form of `make million`."""

from pathlib import Path

from benchmarks.million_rows import measure

ROWS = 50_000


def test_fifty_thousand_rows_take_no_more_memory_than_ten_thousand(tmp_path: Path) -> None:
    figures = measure(tmp_path, ROWS, "--part-rows", "2048")
    assert figures["ok"] == figures["rows_in_parts"] == ROWS
    assert set(figures["peak_mb"]) == {"driver", "worker"}
    assert max(figures["peak_mb"].values()) < 700
    assert max(figures["growth_after_20_percent"].values()) <= 1.1, figures
