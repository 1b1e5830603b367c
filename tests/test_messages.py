"""A message that goes through JSON comes back as it was."""

import json

from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from vlmbatch.messages import (
    Broken,
    Committed,
    Drain,
    Ended,
    Progress,
    Ready,
    Setup,
    Work,
    from_json,
    to_json,
)

TEXT, NUMBER = st.text(max_size=20), st.integers(0, 2**62)
COUNTS = st.fixed_dictionaries({"rows": NUMBER, "failures": st.dictionaries(TEXT, NUMBER)})
MESSAGES = st.one_of(
    st.builds(Setup, TEXT, TEXT, NUMBER, TEXT, TEXT, st.booleans(), st.lists(TEXT).map(tuple)),
    st.builds(Work, NUMBER, NUMBER, NUMBER, TEXT),
    st.builds(Drain, st.floats(0, 100)),
    st.builds(Ready, TEXT, NUMBER, NUMBER),
    st.builds(Committed, NUMBER, NUMBER, COUNTS),
    st.builds(Progress, *[NUMBER] * 6, st.floats(0, 1e9), st.floats(0, 1e9)),
    st.builds(Broken, TEXT, st.none() | TEXT, st.booleans(), st.integers(0, 255)),
    st.builds(Ended),
)


@examples(max_examples=200)
@given(MESSAGES)
def test_a_message_survives_json(message):
    text = json.dumps(to_json(message))
    assert "\n" not in text  # one message is one line of the pipe
    assert from_json(json.loads(text)) == message
