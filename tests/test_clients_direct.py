"""Claude Code against the scripted provider with nothing between: what the tests with the bridge between must equal.

Truth: Claude Code itself, the version pinned in tests/clients/package.json.
"""

from pathlib import Path

import pytest

from tests.support import claude_code
from tests.support.provider import STALL, Reply, ThreadedProvider

MISSING = claude_code.why_not(claude_code.claude)
needs_claude_code = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@needs_claude_code
def test_claude_code_runs_the_tool_and_ends(tmp_path: Path) -> None:
    conversation = claude_code.TwoTurns()
    with ThreadedProvider(handler=conversation) as provider:
        outcome = claude_code.run(provider.url, "Write the file.", tmp_path)

    assert (outcome.status, outcome.result.get("subtype")) == (0, "success"), outcome.stderr
    assert outcome.result["result"] == claude_code.FINAL_TEXT
    assert outcome.result["usage"]["input_tokens"] == sum(tokens for tokens, _ in claude_code.USAGES)
    assert outcome.result["usage"]["output_tokens"] == sum(tokens for _, tokens in claude_code.USAGES)
    assert (tmp_path / claude_code.PROOF).read_text() == "written-by-the-tool"

    assert conversation.turns == 2
    first, second = (received for received in provider.requests if received.path == "/v1/messages")
    assert claude_code.tool_result(first.json()) is None
    result = claude_code.tool_result(second.json())
    assert result is not None
    assert result["content"] == "seen-by-the-model"
    for received in (first, second):
        assert received.header("x-api-key") == [claude_code.KEY]
        assert received.header("x-claude-code-session-id") == [outcome.result["session_id"]]


@needs_claude_code
def test_claude_code_is_ended_when_it_takes_too_long(tmp_path: Path) -> None:
    with ThreadedProvider(handler=lambda _: Reply.stream([STALL])) as provider:
        with pytest.raises(TimeoutError, match="still running"):
            claude_code.run(provider.url, "Wait.", tmp_path, seconds=2)
        provider.exchange().client_gone.wait_blocking()


def test_what_is_missing_is_said_in_plain_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(claude_code, "MODULES", tmp_path / "absent")
    assert claude_code.why_not(claude_code.claude).startswith("Claude Code is not installed: run")
    monkeypatch.setattr(claude_code, "MODULES", tmp_path)
    assert "not installed for" in claude_code.why_not(claude_code.node)
    assert str(tmp_path) not in claude_code.why_not(claude_code.node)
