"""Codex with the scripted provider alone, and through the real server: it runs its own tool, the ledger says what it did.

Truth: Codex itself, the version pinned in tests/clients/package.json. What it does with nothing between is what it must do
with the gateway between.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from tests.support import claude_code, codex
from tests.support.gateway import USER, Gateway, Rows
from tests.support.jssdk import JavaScript
from tests.support.provider import STALL, Received, Reply, ThreadedProvider

MISSING = claude_code.why_not(codex.codex)
needs_codex = pytest.mark.skipif(bool(MISSING), reason=MISSING)

PROMPT = "Write the file."


BETWEEN = ["nothing", "gateway"]
MODELS = [codex.GPT_5, codex.GPT_6]


@dataclass(frozen=True)
class Session:
    """One session, played once. ``rows`` is the ledger's, where a gateway was between."""

    model: str
    outcome: codex.Outcome
    requests: list[Received]
    workspace: Path
    rows: Rows


@pytest.fixture(scope="module", params=list(product(BETWEEN, MODELS)), ids="-".join)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    between, model = request.param
    workspace = tmp_path_factory.mktemp("workspace")
    with ThreadedProvider() as provider:
        provider.replies(codex.calls_the_shell(model), codex.ends(model))
        if between == "nothing":
            outcome = codex.run(f"{provider.url}/v1", PROMPT, workspace, model=model)
            return Session(model, outcome, provider.requests, workspace, Rows([], [], [], [], []))
        with Gateway(openai_base_url=f"{provider.url}/v1") as gateway:
            outcome = codex.run(gateway.openai, PROMPT, workspace, model=model)
            return Session(model, outcome, provider.requests, workspace, gateway.ledger(outcome.session))


@needs_codex
def test_it_runs_its_tool_and_ends(session: Session) -> None:
    outcome = session.outcome
    assert outcome.status == 0, outcome.stderr
    assert [item["text"] for item in outcome.items("agent_message")] == ["I write it.", codex.FINAL_TEXT]
    assert [item["exit_code"] for item in outcome.items("command_execution")] == [0]
    assert outcome.items("error") == []
    assert (session.workspace / codex.PROOF).read_text() == "written-by-the-tool"
    assert outcome.usage["input_tokens"] == sum(tokens for tokens, _ in codex.USAGES)
    assert outcome.usage["output_tokens"] == sum(tokens for _, tokens in codex.USAGES)


@needs_codex
def test_the_provider_sees_codex(session: Session) -> None:
    """The headers by which it is known there, its own credential, no more requests than turns."""
    assert len(session.requests) == 2
    for received in session.requests:
        assert (received.method, received.path) == ("POST", "/v1/responses")
        assert received.header("authorization") == [f"Bearer {codex.KEY}"]
        assert received.header("user-agent")[0].startswith("codex_exec/")
        assert received.header("originator") == ["codex_exec"]
        assert received.header("session-id") == [session.outcome.session]
        assert received.json()["prompt_cache_key"] == session.outcome.session


@needs_codex
def test_where_it_offers_its_tools(session: Session) -> None:
    """Not in ``tools`` to every model: whoever adds a tool must not take its absence for a request without tools."""
    for received in session.requests:
        body = received.json()
        if session.model == codex.GPT_5:
            tools, choice = body["tools"], (body["tool_choice"], body["parallel_tool_calls"])
            assert choice == ("auto", True)
        else:
            assert "tools" not in body
            assert (body["input"][0]["type"], body["input"][0]["role"]) == ("additional_tools", "developer")
            (tools,) = (group["tools"] for group in body["input"][0]["tools"] if group["name"] == "functions")
        assert codex.SHELL_CALLS[session.model]["name"] in [tool.get("name") for tool in tools]


@needs_codex
def test_what_the_model_said_comes_back_and_the_result_after_it(session: Session) -> None:
    """Codex repeats the items with their ids and all: by these the gateway will know them again (wire.md D6)."""
    first, second = (received.json() for received in session.requests)
    assert second["input"][: len(first["input"])] == first["input"]
    thought, said, call, result = second["input"][len(first["input"]) :]
    assert (thought["type"], thought["encrypted_content"]) == ("reasoning", codex.THOUGHT)
    assert (said["type"], said["id"]) == ("message", "msg_turn1")
    assert call == codex.SHELL_CALLS[session.model]
    assert (result["type"], result["call_id"]) == (f"{call['type']}_output", codex.TOOL_CALL_ID)
    assert "seen-by-the-model" in json.dumps(result["output"])
    assert second.get("tools") == first.get("tools")


@needs_codex
@pytest.mark.parametrize("session", list(product(["gateway"], MODELS)), ids="-".join, indirect=True)
def test_the_ledger_says_what_it_did(session: Session) -> None:
    rows = session.rows
    asking, answering = rows.interceptions
    for row in (asking, answering):
        assert (row["status"], row["http_status"], row["streaming"]) == ("completed", 200, 1)
        assert (row["initiator_id"], row["client"], row["client_session_id"]) == (USER, "codex", session.outcome.session)
        assert (row["provider"], row["provider_name"], row["route"]) == ("openai", "openai", "/v1/responses")
        assert (row["model"], row["credential_kind"]) == (session.model, "byok")
        assert row["user_agent"].startswith("codex_exec/")
    assert asking["correlating_tool_call_id"] is None
    assert answering["correlating_tool_call_id"] == codex.TOOL_CALL_ID

    (prompt,) = rows.user_prompts
    assert (prompt["interception_id"], prompt["prompt"]) == (asking["id"], PROMPT)
    (call,) = rows.tool_usages
    assert (call["interception_id"], call["tool_call_id"]) == (asking["id"], codex.TOOL_CALL_ID)
    assert (call["injected"], call["invocation_error"]) == (0, None)
    assert call["tool"] == codex.SHELL_CALLS[session.model]["name"]
    assert codex.PROOF in call["input"]
    assert [(usage["input_tokens"], usage["output_tokens"]) for usage in rows.token_usages] == list(codex.USAGES)
    assert {usage["completeness"] for usage in rows.token_usages} == {"complete"}


@needs_codex
def test_it_is_ended_when_it_takes_too_long(tmp_path: Path) -> None:
    with ThreadedProvider(handler=lambda _: Reply.stream([STALL])) as provider:
        with pytest.raises(TimeoutError, match="still running"):
            codex.run(f"{provider.url}/v1", "Wait.", tmp_path, seconds=2)
        provider.exchange().client_gone.wait_blocking()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("turn", [codex.calls_the_shell, codex.ends])
async def test_the_script_is_protocol(js: JavaScript, turn: Callable[[str], Reply], model: str) -> None:
    """What the events say and what the last of them says is the same to a vendor's SDK: so it is a fair test of Codex."""
    steps = [step for step in turn(model).body if isinstance(step, bytes)]
    final = await js.read("responses", steps)
    untold = steps[-1].replace(b'"output":', b'"x_output":')
    told = await js.read("responses", [*steps[:-1], untold])
    assert (final["status"], final["output"]) == ("completed", told["output"])


def test_what_is_missing_is_said_in_plain_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(codex, "MODULES", tmp_path)
    assert claude_code.why_not(codex.codex).startswith("Codex is not installed: run")
