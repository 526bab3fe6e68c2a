"""Records to write into a ledger, with only what a test is about spelled out."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from aibridge.records import (
    Interception,
    InterceptionEnded,
    ModelThought,
    PromptUsage,
    Record,
    TokenUsage,
    ToolUsage,
)

NOON = datetime(2026, 11, 21, 12, 0, 0, 123456, UTC)


def start(id: str = "i", **fields: Any) -> Interception:
    known = {
        "initiator_id": "ada",
        "provider": "anthropic",
        "provider_name": "main",
        "model": "claude-opus-5-5",
        "started_at": NOON,
        "route": "/v1/messages",
        "streaming": True,
    }
    return Interception(id=id, **{**known, **fields})


def ended(id: str = "i", **fields: Any) -> InterceptionEnded:
    return InterceptionEnded(interception_id=id, **{"ended_at": NOON, "status": "completed", **fields})


def usage(id: str = "u", **fields: Any) -> TokenUsage:
    return TokenUsage(id=id, **{"interception_id": "i", "created_at": NOON, "completeness": "complete", **fields})


def prompt(id: str = "p", **fields: Any) -> PromptUsage:
    return PromptUsage(id=id, **{"interception_id": "i", "created_at": NOON, "prompt": "Why?", **fields})


def tool(id: str = "t", **fields: Any) -> ToolUsage:
    return ToolUsage(id=id, **{"interception_id": "i", "created_at": NOON, "tool": "Read", **fields})


def thought(id: str = "m", **fields: Any) -> ModelThought:
    return ModelThought(id=id, **{"interception_id": "i", "created_at": NOON, "content": "Hm.", **fields})


def one_of_each() -> Sequence[Record]:
    """A whole interception, in the order in which it happens."""
    return [start(), prompt(), usage(), tool(), thought(), ended()]
