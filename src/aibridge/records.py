"""What the ledger is made of: one frozen type per table. Field names are column names (docs/architecture.md).

Ids and times are made by whoever creates a record; a database stores what it is given. Times are timezone-aware, in UTC.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import msgspec

from aibridge.errors import ProviderKind
from aibridge.wire.base import Completeness

Status = Literal["in_progress", "completed", "failed", "client_disconnected", "interrupted"]
"""How far an interception has come, or how it ended."""

CredentialKind = Literal["byok", "centralized"]
"""Whose credential went to the provider: the client brought its own key, or the bridge's configuration has it."""


class Interception(msgspec.Struct, frozen=True, tag=True):
    """One client request, as known before it goes to the provider.

    `provider` is the kind, `provider_name` the configured instance. `credential_hint` is a masked form of the credential
    that goes upstream. `metadata` holds what the actor's authenticator and the client say beside: sub-agent ids, notes.
    """

    id: str
    initiator_id: str
    provider: ProviderKind
    provider_name: str
    model: str | None
    started_at: datetime
    route: str
    streaming: bool
    client: str | None = None
    client_session_id: str | None = None
    user_agent: str | None = None
    correlating_tool_call_id: str | None = None
    credential_kind: CredentialKind | None = None
    credential_hint: str | None = None
    metadata: Mapping[str, Any] = {}


class InterceptionEnded(msgspec.Struct, frozen=True, tag=True):
    """How an interception ended. `time_to_first_byte_ms` is from its start to the provider's first body byte."""

    interception_id: str
    ended_at: datetime
    status: Status
    http_status: int | None = None
    error: str | None = None
    time_to_first_byte_ms: float | None = None


class TokenUsage(msgspec.Struct, frozen=True, tag=True):
    """Tokens of one upstream response. A counter that the provider never reported is None, which is not 0.

    `input_tokens` excludes cached tokens for every provider. ``metadata["usage"]`` is the provider's own object.
    """

    id: str
    interception_id: str
    created_at: datetime
    completeness: Completeness
    provider_response_id: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None
    metadata: Mapping[str, Any] = {}


class PromptUsage(msgspec.Struct, frozen=True, tag=True):
    """What the user asked: the text of the last user message, unless it only carried tool results."""

    id: str
    interception_id: str
    created_at: datetime
    prompt: str
    provider_response_id: str | None = None
    metadata: Mapping[str, Any] = {}


class ToolUsage(msgspec.Struct, frozen=True, tag=True):
    """A tool call that the model made. `tool` is the tool's own name, `input` the raw text of its arguments.

    `injected`: the bridge offered the tool and ran it at `server_url`; `invocation_error` says why that failed.
    """

    id: str
    interception_id: str
    created_at: datetime
    tool: str
    input: str | None = None
    tool_call_id: str | None = None
    provider_response_id: str | None = None
    server_url: str | None = None
    injected: bool = False
    invocation_error: str | None = None
    metadata: Mapping[str, Any] = {}


class ModelThought(msgspec.Struct, frozen=True, tag=True):
    """Something the model thought aloud. ``metadata["source"]`` says in which form."""

    id: str
    interception_id: str
    created_at: datetime
    content: str
    metadata: Mapping[str, Any] = {}


Record = Interception | InterceptionEnded | TokenUsage | PromptUsage | ToolUsage | ModelThought
