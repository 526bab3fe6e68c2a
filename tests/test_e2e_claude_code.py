"""Claude Code through the real server: it executes a tool for real, and the ledger says who did what.

Truth: Claude Code itself, the version pinned in tests/clients/package.json; ``tests/test_clients_direct.py`` shows what the
same conversation is without a gateway between.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support import claude_code
from tests.support.gateway import USER, Gateway
from tests.support.provider import Received, Reply, ThreadedProvider

MISSING = claude_code.why_not(claude_code.claude)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

PROMPT = "Write the file."
THOUGHT = "The user wants a file. I use the shell."

# A thinking block ahead of the others, which the driver's own streams do not have.
THINKING = f"""\
event: content_block_start
data: {{"type":"content_block_start","index":0,"content_block":{{"type":"thinking","thinking":"","signature":""}}}}

event: content_block_delta
data: {{"type":"content_block_delta","index":0,"delta":{{"type":"thinking_delta","thinking":"{THOUGHT}"}}}}

event: content_block_delta
data: {{"type":"content_block_delta","index":0,"delta":{{"type":"signature_delta","signature":"EqQBCkYIBxgCKkA="}}}}

event: content_block_stop
data: {{"type":"content_block_stop","index":0}}

""".encode()


class ThinkingTwoTurns(claude_code.TwoTurns):
    """As the driver's conversation, and the model thinks before it calls the tool."""

    def __call__(self, received: Received) -> Reply:
        reply = super().__call__(received)
        if not any(isinstance(step, bytes) and claude_code.TOOL_CALL_ID.encode() in step for step in reply.body):
            return reply
        start, ping, *rest = reply.body
        shifted = [step.replace(b'"index": 1', b'"index": 2') for step in rest if isinstance(step, bytes)]
        shifted = [step.replace(b'"index": 0', b'"index": 1') for step in shifted]
        return Reply(reply.status, reply.headers, [start, ping, THINKING, *shifted], reply.framing)


@pytest.fixture(scope="module")
def played(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Gateway, ThreadedProvider, claude_code.Outcome, Path]]:
    """One conversation, played once: Claude Code takes seconds to start."""
    workspace = tmp_path_factory.mktemp("workspace")
    with ThreadedProvider(handler=ThinkingTwoTurns()) as provider, Gateway(anthropic_base_url=provider.url) as gateway:
        outcome = claude_code.run(gateway.anthropic, PROMPT, workspace)
        yield gateway, provider, outcome, workspace


Played = tuple[Gateway, ThreadedProvider, claude_code.Outcome, Path]


def test_it_works_as_without_a_gateway(played: Played) -> None:
    _, _, outcome, workspace = played
    assert (outcome.status, outcome.result.get("subtype")) == (0, "success"), outcome.stderr
    assert outcome.result["result"] == claude_code.FINAL_TEXT
    assert outcome.result["usage"]["input_tokens"] == sum(tokens for tokens, _ in claude_code.USAGES)
    assert outcome.result["usage"]["output_tokens"] == sum(tokens for _, tokens in claude_code.USAGES)
    assert (workspace / claude_code.PROOF).read_text() == "written-by-the-tool"


def test_the_provider_sees_claude_code(played: Played) -> None:
    """The headers by which it is known there, one credential, and the result of the tool that was run."""
    _, provider, outcome, _ = played
    turns = [received for received in provider.requests if received.path == "/v1/messages"]
    for received in turns:
        assert received.header("x-api-key") == [claude_code.KEY]
        assert received.header("authorization") == []
        assert received.header("x-claude-code-session-id") == [outcome.result["session_id"]]
        assert received.header("user-agent")[0].startswith("claude-cli/")
        assert received.header("anthropic-version") == ["2023-06-01"]
        assert received.header("anthropic-beta")
        assert received.query == "beta=true"
    result = claude_code.tool_result(turns[-1].json())
    assert result is not None
    assert result["content"] == "seen-by-the-model"


def test_the_thinking_comes_back_as_it_was(played: Played) -> None:
    """Signed, and therefore byte for byte (failures.md 6)."""
    _, provider, _, _ = played
    last = [received for received in provider.requests if received.path == "/v1/messages"][-1]
    blocks = [
        block
        for message in last.json()["messages"]
        if isinstance(message["content"], list)
        for block in message["content"]
        if block["type"] == "thinking"
    ]
    assert blocks == [{"type": "thinking", "thinking": THOUGHT, "signature": "EqQBCkYIBxgCKkA="}]


def test_the_ledger_says_who_did_what(played: Played) -> None:
    gateway, _, outcome, _ = played
    rows = gateway.ledger(outcome.result["session_id"])
    turns = [row for row in rows.interceptions if row["model"] == claude_code.MODEL]
    assert len(turns) >= 2
    for row in rows.interceptions:
        assert row["status"] == "completed"
        assert (row["initiator_id"], row["client"]) == (USER, "claude-code")
        assert (row["provider"], row["provider_name"], row["route"]) == ("anthropic", "anthropic", "/v1/messages")
        assert row["user_agent"].startswith("claude-cli/")
        assert row["credential_kind"] == "byok"
        assert row["streaming"]
    (answering,) = (row for row in turns if row["correlating_tool_call_id"] is not None)
    assert answering["correlating_tool_call_id"] == claude_code.TOOL_CALL_ID

    (call,) = rows.tool_usages
    assert (call["tool"], call["tool_call_id"], call["injected"]) == ("Bash", claude_code.TOOL_CALL_ID, 0)
    assert claude_code.COMMAND.split()[0] in call["input"]
    assert call["interception_id"] != answering["id"]

    assert [(thought["metadata"]["source"], thought["content"]) for thought in rows.model_thoughts] == [
        ("thinking", THOUGHT)
    ]
    prompts = [prompt for prompt in rows.user_prompts if prompt["interception_id"] == call["interception_id"]]
    assert len(prompts) == 1
    assert prompts[0]["prompt"].endswith(PROMPT)
    assert not any(prompt["interception_id"] == answering["id"] for prompt in rows.user_prompts)

    counted = {
        (usage["input_tokens"], usage["output_tokens"])
        for usage in rows.token_usages
        if usage["interception_id"] in (call["interception_id"], answering["id"])
    }
    assert counted == set(claude_code.USAGES)
    assert {usage["completeness"] for usage in rows.token_usages} == {"complete"}


def test_nothing_else_is_in_the_ledger(played: Played) -> None:
    """No row without a session, none for the probe of the connection, and one usage for each request."""
    gateway, provider, outcome, _ = played
    rows = gateway.ledger(outcome.result["session_id"])
    asked = [received for received in provider.requests if received.path == "/v1/messages"]
    with closing(sqlite3.connect(f"file:{gateway.database}?mode=ro", uri=True)) as database:
        (count,) = database.execute("SELECT count(*) FROM aibridge_interceptions").fetchone()
    assert count == len(rows.interceptions) == len(asked) == len(rows.token_usages)
