"""Which client sent a request, and in which of its sessions.

Truth: the table of clients.md 2, measured with the programs themselves.
"""

import pytest

from aibridge.clients import Client, identify

Fields = dict[str, str]


def sender(fields: Fields) -> Client:
    return identify([(name.encode(), value.encode()) for name, value in fields.items()])


def agent(value: str, **fields: str) -> Fields:
    return {"user-agent": value} | {name.replace("_", "-"): value for name, value in fields.items()}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (agent("claude-cli/2.1.330 (external, cli)", x_app="cli"), "claude-code"),
        (agent("claude-cli/2.1.330 (external, sdk-cli)", x_claude_code_session_id="s"), "claude-code"),
        (agent("claude-cli/2.1.330 (external, sdk-py, agent-sdk/0.2.187)"), "claude-agent-sdk"),
        (agent("claude-cli/0.9.1 (external, cli)", x_claude_code_session_id="s"), "claude-code"),
        (agent("codex_exec/0.169.0 (Debian 12; x86_64) unknown", originator="codex_exec"), "codex"),
        (agent("codex_cli_rs/0.169.0 (Mac OS 15.1)"), "codex"),
        (agent("opencode/1.18.33 ai-sdk/provider-utils/4.0 runtime/bun/1.4.4"), "opencode"),
        (agent("opencode/1.18.33", originator="opencode"), "opencode"),
        # Kilo has three user agents, and one is opencode's
        (agent("kilo/latest/7.7.9/cli ai-sdk/anthropic/4.0"), "kilo"),
        (agent("Kilo-Code/7.7.9 ai-sdk/openai"), "kilo"),
        (agent("opencode/7.7.9", originator="opencode", x_title="Kilo Code", http_referer="https://kilocode.ai"), "kilo"),
        (agent("opencode/7.7.9", http_referer="https://kilocode.ai"), "kilo"),
        # Copilot names its SDK
        (agent("Anthropic/JS 0.94.0", x_initiator="user"), "copilot"),
        (agent("OpenAI/JS 5.20.1", x_initiator="agent"), "copilot"),
        (agent("copilot/1.0.102"), "copilot"),
        (agent("GithubCopilot/1.155.0"), "copilot"),
        (agent("opencode/1.18.33", x_initiator="user"), "opencode"),
        # Qwen impersonates Claude Code, with its own version and without a session
        (agent("QwenCode/0.24.4 (linux; x64)"), "qwen-code"),
        (agent("claude-cli/0.24.4 (external, cli)", x_app="cli"), "qwen-code"),
        (agent("Charm Crush/0.20"), "crush"),
        (agent("Charm-Crush/0.30"), "crush"),
        (agent("junie:1.0"), "junie"),
        (agent("mux/1.0"), "mux"),
        (agent("xum/1.0"), "mux"),
        (agent("Anthropic/Python 2.12.0"), "anthropic-sdk"),
        (agent("Anthropic/JS 1.12.0"), "anthropic-sdk"),
        (agent("AsyncAnthropic/Python 2.12.0"), "anthropic-sdk"),
        (agent("OpenAI/Python 3.54.0"), "openai-sdk"),
        (agent("OpenAI/JS 7.57.0"), "openai-sdk"),
        (agent("Agents/Python 0.24.0"), "openai-agents"),
        (agent("Agents/JavaScript 0.20.0"), "openai-agents"),
        (agent("pydantic-ai/2.68.0"), "pydantic-ai"),
        (agent("langchain-anthropic/1.7.7"), "langchain"),
        (agent("ai/7.0.173 ai-sdk/provider-utils/4.0.1"), "ai-sdk"),
        (agent("ai-sdk-openai/4.0.0"), "ai-sdk"),
        (agent("litellm/1.80.0"), "litellm"),
        (agent("aider/0.86.2"), "aider"),
        (agent("curl/8.5.0"), "curl"),
        # nothing that tells one from another
        (agent("node-fetch"), None),
        (agent("ls/JS 5.23.2"), None),
        (agent("Bun/1.4.4"), None),
        (agent("maid/1.0"), None),
        (agent(""), None),
        ({}, None),
        ({"x-initiator": "user"}, None),
    ],
)
def test_names(fields: Fields, name: str | None) -> None:
    assert sender(fields).name == name


@pytest.mark.parametrize(
    ("fields", "session_id"),
    [
        ({"x-claude-code-session-id": "cc"}, "cc"),
        ({"session-id": "codex", "thread-id": "t", "x-client-request-id": "r"}, "codex"),
        ({"session_id": "pi"}, "pi"),
        ({"x-session-id": "ses_1", "x-session-affinity": "ses_1"}, "ses_1"),
        ({"x-session-affinity": "ses_2"}, "ses_2"),
        ({"x-client-session-id": "copilot"}, "copilot"),
        ({"x-coder-chat-id": "chat"}, "chat"),
        ({"x-mux-workspace-id": "mux"}, "mux"),
        ({"x-interaction-id": "vs"}, "vs"),
        # the client's own before those that a gateway or an editor adds
        ({"x-interaction-id": "b", "x-session-id": "a"}, "a"),
        ({"x-claude-code-session-id": "", "x-session-id": "a"}, "a"),
        ({"x-request-id": "r"}, None),
        ({}, None),
    ],
)
def test_sessions(fields: Fields, session_id: str | None) -> None:
    assert sender(fields).session_id == session_id


def test_sub_agents() -> None:
    fields = {"x-claude-code-agent-id": "a", "x-claude-code-parent-agent-id": "p", "thread-id": ""}
    assert sender(fields).agents == {"agent_id": "a", "parent_agent_id": "p"}
    assert sender({"thread-id": "t"}).agents == {"thread_id": "t"}
    assert sender({}).agents == {}


def test_the_user_agent_as_it_was_sent() -> None:
    assert sender(agent("a (b)")).user_agent == "a (b)"
    assert sender({}).user_agent is None
    assert identify([(b"user-agent", b"caf\xe9"), (b"user-agent", b"second")]).user_agent == "caf\u00e9"


def test_what_is_kept_is_bounded() -> None:
    found = sender({"user-agent": "a" * 5000, "x-session-id": "b" * 5000, "thread-id": "c" * 5000})
    assert (found.user_agent, found.session_id) == ("a" * 1000, "b" * 1000)
    assert found.agents == {"thread_id": "c" * 1000}
