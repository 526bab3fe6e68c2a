"""Row 17 of failures.md: a second upstream stream that reuses block indexes, or begins a second time.

Truth: the row, and the official SDKs of both languages, which have to agree about what they were sent. All that can be in
such a stream is in test_injection_sdks.py.
"""

from functools import partial

import pytest

from tests.support.injected import Dialect, Says, Thinks, turn
from tests.support.injected_dialects import each_dialect
from tests.support.injected_loop import InnerLoop, Split, looks
from tests.support.jssdk import JavaScript
from tests.support.provider import at_random, bytewise


@each_dialect
@pytest.mark.parametrize("split", [None, bytewise, partial(at_random, seed=17)])
async def test_two_streams_are_one(dialect: Dialect, split: Split | None, js: JavaScript) -> None:
    first = turn(1, Thinks("Let me see.", "signature-1"), Says("Looking. "), looks("a"), looks("b"))
    second = turn(2, Thinks("That is it.", "signature-2"), Says("Found."))
    async with InnerLoop(dialect, first, second, split=split) as loop:
        call = await loop.ask(dialect.request(stream=True))
    dialect.assert_one_envelope(call.body)
    seen = await loop.seen(call, js, stream=True)
    assert "".join(one[1] for one in seen.said if one[0] == "text") == "Looking. Found."
    assert not [one for one in seen.said if one[0] == "call"]
