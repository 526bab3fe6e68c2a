"""The wire formats: Anthropic Messages, OpenAI Chat Completions, OpenAI Responses. Pure: bytes in, facts out.

A provider's own words (block, chunk, item) stay inside its module; outside we say turn, call, fact and record.
"""

from aibridge.wire.base import Request, RequestFacts, ResponseFacts, ResponseReader, Thought, ToolCall, Usage, WireFormat
from aibridge.wire.chat import CHAT
from aibridge.wire.messages import MESSAGES
from aibridge.wire.responses import RESPONSES

__all__ = [
    "CHAT",
    "MESSAGES",
    "RESPONSES",
    "Request",
    "RequestFacts",
    "ResponseFacts",
    "ResponseReader",
    "Thought",
    "ToolCall",
    "Usage",
    "WireFormat",
]
