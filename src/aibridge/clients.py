"""Which program sent a request, and in which of its sessions. Facts from clients.md 2.

User agents alone mislead: Kilo calls itself opencode on one of its routes, Qwen Code calls itself Claude Code, Copilot
names the SDK that it is built with. So the more particular mark is looked for first.
"""

import re
from functools import lru_cache
from typing import Final

import msgspec

from aibridge.wire.base import Headers

_SESSION_HEADERS: Final = (
    b"x-claude-code-session-id",
    b"session-id",  # Codex
    b"session_id",  # pi
    b"x-session-id",  # opencode, Kilo
    b"x-session-affinity",
    b"x-client-session-id",  # Copilot CLI
    b"x-coder-chat-id",
    b"x-mux-workspace-id",
    b"x-interaction-id",  # Copilot in VS Code
)

_AGENT_HEADERS: Final = {
    b"x-claude-code-agent-id": "agent_id",
    b"x-claude-code-parent-agent-id": "parent_agent_id",
    b"thread-id": "thread_id",
}

# In this order: the first that matches the user agent names the client.
_USER_AGENTS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), name)
    for pattern, name in (
        (r"kilo", "kilo"),
        (r"qwen-?code", "qwen-code"),
        (r"claude-cli/.*agent-sdk", "claude-agent-sdk"),
        (r"claude-(cli|code)", "claude-code"),
        (r"codex", "codex"),
        (r"opencode", "opencode"),
        (r"(github-?)?copilot", "copilot"),
        (r"charm[ -]crush", "crush"),
        (r"junie", "junie"),
        (r"\b(mux|xum)/", "mux"),
        (r"aider", "aider"),
        (r"litellm", "litellm"),
        (r"langchain", "langchain"),
        (r"pydantic-ai", "pydantic-ai"),
        (r"agents/(python|javascript)", "openai-agents"),
        (r"ai-sdk|\bai/\d", "ai-sdk"),
        (r"anthropic/", "anthropic-sdk"),
        (r"openai/", "openai-sdk"),
        (r"curl/", "curl"),
    )
)

_SDKS: Final = frozenset({"anthropic-sdk", "openai-sdk"})

_MAX_IDENTITY: Final = 1000


_READ: Final = frozenset({b"user-agent", b"x-title", b"x-initiator", b"http-referer", *_SESSION_HEADERS, *_AGENT_HEADERS})


class Client(msgspec.Struct, frozen=True):
    """What the request's headers say about its sender; None where they do not say."""

    name: str | None
    session_id: str | None
    user_agent: str | None
    agents: dict[str, str]
    """Ids of the sub-agent, its parent or its thread."""


def identify(headers: Headers) -> Client:
    """Read the headers of a client. Values are cut to 1,000 characters."""
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in _READ and name not in found:
            found[name] = value.decode("latin-1")[:_MAX_IDENTITY]
    user_agent = found.get(b"user-agent")
    return Client(
        name=_client_name(found, user_agent or ""),
        session_id=next(filter(None, map(found.get, _SESSION_HEADERS)), None),
        user_agent=user_agent,
        agents={key: found[name] for name, key in _AGENT_HEADERS.items() if found.get(name)},
    )


def _client_name(headers: dict[bytes, str], user_agent: str) -> str | None:
    if headers.get(b"x-title", "").lower().startswith("kilo"):
        return "kilo"
    name = _named_by(user_agent)
    if name == "claude-code" and "claude-cli/0." in user_agent and b"x-claude-code-session-id" not in headers:
        return "qwen-code"  # it borrows Claude Code's user agent, with its own version number and without a session
    if name in _SDKS and b"x-initiator" in headers:
        return "copilot"
    if name == "opencode" and "kilocode" in headers.get(b"http-referer", ""):
        return "kilo"
    return name


@lru_cache(maxsize=1000)
def _named_by(user_agent: str) -> str | None:
    """The same few programs come again and again."""
    return next((name for pattern, name in _USER_AGENTS if pattern.search(user_agent)), None)
