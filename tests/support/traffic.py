"""A corpus of provider traffic in three protocols, with what an honest ledger says about each exchange.

Where truth comes from: the event grammar, the members and their order from the vendors' documentation and SDK types
(anthropic 2.12.0, openai 3.54.0); quirks of compatible servers (OpenRouter, DeepSeek, vLLM, Azure) from their
documentation and from reports. No real provider was contacted. That the streams are protocol and not fantasy is shown
by ``tests/test_traffic.py``: the vendors' own accumulators read every completed stream and agree with ``expect``, save
where a recording says why they do not. The expectations follow our own rules of the ledger:

- ``input_tokens`` excludes the prompt cache: as Anthropic reports it; for OpenAI prompt minus cached minus written,
  never below 0. A counter that was never reported is None.
- ``message_delta.usage`` is a running total: it overwrites, null and absent keep the earlier figure, and a zero input
  does not erase a larger one. A non-empty ``usage.iterations`` is summed instead of the top level.
- ``complete``: the final figures of a response that ended. ``partial``: the response was cut or ended by an error; what
  had been reported, else None. ``unknown``: it ended, and its provider reported no usage. An HTTP error has no usage.
- A thinking block is a thought even when its text is empty or redacted; Chat reasoning is one thought per choice;
  Responses summaries, contents and commentary messages are a thought each.
- A tool call's input is the text the provider sent. The prompt of a request is the newest user message, its text parts
  joined by a line feed; a request that continues with tool results has none.
"""

from .recording import Completeness, Expectation, Format, Recording, ToolCall, UsageRow
from .traffic_chat import CHAT
from .traffic_messages import MESSAGES
from .traffic_responses import RESPONSES

__all__ = [
    "ALL",
    "CHAT",
    "MESSAGES",
    "RESPONSES",
    "Completeness",
    "Expectation",
    "Format",
    "Recording",
    "ToolCall",
    "UsageRow",
    "named",
]

ALL: tuple[Recording, ...] = (*MESSAGES, *CHAT, *RESPONSES)

_BY_NAME = {recording.name: recording for recording in ALL}


def named(name: str) -> Recording:
    return _BY_NAME[name]
