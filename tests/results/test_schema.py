"""Results as Arrow, and back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import codes, result
from vlmbatch.results.schema import RESULT_SCHEMA, to_batch, to_results


@given(st.lists(st.tuples(st.text(max_size=5), codes()), max_size=5))
def test_results_come_back_as_they_were_written(kinds) -> None:  # type: ignore[no-untyped-def]
    results = [result(row, 0, 0, said, code) for row, (said, code) in enumerate(kinds)]
    batch = to_batch(results, model="m@1", schema=RESULT_SCHEMA)
    again = to_batch(list(to_results(batch)), model="m@1", schema=RESULT_SCHEMA)
    assert again == batch
