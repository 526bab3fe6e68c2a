"""Claude Code and Codex with injected tools and their own: whole sessions, in which the gateway dies (issue 3, part 4).

Truth: the clients themselves, in the versions pinned in tests/clients/package.json. They must not notice anything; the
provider must hear all that it said, and hidden parts byte for byte as they were (wire.md A6, C5, D6).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from tests.support import claude_code, codex
from tests.support.claude_code import why_not
from tests.support.conversations import (
    TOML,
    Call,
    Hop,
    Round,
    add,
    assert_constant,
    assert_extend_each_other,
    calls_in,
    elements,
    hidden_words,
    marks,
    member,
    without_marks,
)
from tests.support.conversations_messages import MessagesSpeech, told, unmarked
from tests.support.gateway import USER, Gateway, Rows
from tests.support.provider import Received, Reply, ThreadedProvider

WITHOUT_CLAUDE: Final = why_not(claude_code.claude)
WITHOUT_CODEX: Final = why_not(codex.codex)
needs_claude = pytest.mark.skipif(bool(WITHOUT_CLAUDE), reason=WITHOUT_CLAUDE)
needs_codex = pytest.mark.skipif(bool(WITHOUT_CODEX), reason=WITHOUT_CODEX)

BASH: Final = Call(
    "toolu_shown_Bash",
    "Bash",
    json.dumps({"command": claude_code.COMMAND, "description": "Write a file"}),
    "seen-by-the-model",
)
"""A call of the client's own tool. What it prints comes back to the model."""

SESSION: Final = (
    Round(
        "Write the file.",
        (
            Hop("Let me add.", "A sum first.", (add(40041, 1),)),
            Hop("I write it.", "Now all at once.", (add(40042, 1), BASH, add(40043, 1))),
            Hop("The file is written."),
        ),
    ),
    Round("Add again.", (Hop(thought="They want another.", calls=(add(40044, 1),)), Hop("Added.", "That was all."))),
    Round("Thanks.", (Hop("You are welcome.", "Polite."),)),
)
"""A run of the client each, the later ones in the session of the first."""

HOPS: Final = [hop for run in SESSION for hop in run.hops]
HIDDEN: Final = hidden_words(SESSION)

Outcome = TypeVar("Outcome")


def gateway_before(provider: ThreadedProvider) -> Gateway:
    toml = TOML.replace("{provider}", provider.url)
    return Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1", toml=toml)


def play(gateway: Gateway, run: Callable[[str, str | None], Outcome], session: Callable[[Outcome], str]) -> list[Outcome]:
    """The three runs. After the first one the gateway dies and is started again."""
    outcomes = [run(SESSION[0].prompt, None)]
    gateway.kill()
    gateway.start()
    return outcomes + [run(said.prompt, session(outcomes[0])) for said in SESSION[1:]]


def kept_in(home: Path) -> bytes:
    """What a client has written down of its sessions."""
    return b"".join(path.read_bytes() for path in home.rglob("*.jsonl"))


def assert_seen_as_one(kept: bytes, workspace: Path) -> None:
    """The client's own tool was run, and nothing of the gateway's is known to the client."""
    assert (workspace / claude_code.PROOF).read_text() == "written-by-the-tool"
    assert b"seen-by-the-model" in kept
    assert [words for words in HIDDEN if words in kept] == []


def assert_recorded(rows: Rows, client: str, names: dict[str, str]) -> None:
    """The ledger has every run of a tool once. ``names`` are the client's for its own tool and the call of it."""
    about = {(row["status"], row["initiator_id"], row["client"]) for row in rows.interceptions}
    assert about == {("completed", USER, client)}
    assert not any("notes" in row["metadata"] for row in rows.interceptions)
    called = [(row["tool_call_id"], row["tool"], row["injected"], row["invocation_error"]) for row in rows.tool_usages]
    assert sorted(called) == sorted(
        (call.id, "add", 1, None) if call.injected else (names[call.id], names[call.name], 0, None)
        for call in calls_in(SESSION)
    )


# --- Claude Code ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ClaudeScript(claude_code.TwoTurns):
    """The provider's part: the next hop, if it hears those before as it said them. Asides are answered as elsewhere."""

    requests: list[bytes] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __call__(self, received: Received) -> Reply:
        if not received.path.endswith("/v1/messages") or b'"Bash"' not in member(received.body, "tools"):
            return claude_code.TwoTurns.__call__(self, received)
        self.requests.append(received.body)
        body, speech = received.json(), MessagesSpeech()
        heard = [[*map(unmarked, message["content"])] for message in body["messages"] if message["role"] == "assistant"]
        if heard not in (_said(len(heard), forgotten) for forgotten in (0, 3, 5)):
            self.complaints.append(f"request {len(self.requests)}: {heard}")
        return speech.reply(HOPS[len(heard)], len(heard) + 1, body)


def _said(hops: int, forgotten: int) -> list[Any]:
    """What the provider has said in so many hops. Claude Code drops the thoughts of earlier runs when it resumes a session,
    also without a gateway (seen on 2026-11-22), which leaves the others valid (wire.md A6).
    """
    said = (replace(hop, thought="") if number < forgotten else hop for number, hop in enumerate(HOPS[:hops]))
    return [MessagesSpeech().said(hop, number) for number, hop in enumerate(said, 1)]


@dataclass(frozen=True)
class ClaudeSession:
    script: ClaudeScript
    outcomes: list[claude_code.Outcome]
    workspace: Path
    kept: bytes
    rows: Rows


@pytest.fixture(scope="module")
def claude_session(tmp_path_factory: pytest.TempPathFactory) -> ClaudeSession:
    """One session, played once."""
    workspace, home = tmp_path_factory.mktemp("workspace"), tmp_path_factory.mktemp("claude")
    script = ClaudeScript()
    with ThreadedProvider(handler=script) as provider, gateway_before(provider) as gateway:

        def run(prompt: str, session: str | None) -> claude_code.Outcome:
            env = {"CLAUDE_CONFIG_DIR": str(home)}
            return claude_code.run(gateway.anthropic, prompt, workspace, env=env, resume=session)

        outcomes = play(gateway, run, lambda first: str(first.result["session_id"]))
        rows = gateway.ledger(outcomes[0].result["session_id"])
        return ClaudeSession(script, outcomes, workspace, kept_in(home), rows)


@needs_claude
def test_claude_code_does_not_notice(claude_session: ClaudeSession) -> None:
    for outcome, run in zip(claude_session.outcomes, SESSION, strict=True):
        assert (outcome.status, outcome.result["subtype"]) == (0, "success"), outcome.stderr
        assert outcome.result["result"] == run.hops[-1].words
        assert outcome.result["num_turns"] == run.requests
    assert len({outcome.result["session_id"] for outcome in claude_session.outcomes}) == 1
    assert_seen_as_one(claude_session.kept, claude_session.workspace)


@needs_claude
def test_the_provider_hears_all_that_it_said_to_claude_code(claude_session: ClaudeSession) -> None:
    script = claude_session.script
    assert script.complaints == []
    assert len(script.requests) == len(HOPS)
    contents = [message["content"] for message in json.loads(script.requests[-1])["messages"]]
    blocks = [block for content in contents if not isinstance(content, str) for block in content]
    results = [(block["tool_use_id"], told(block)) for block in blocks if block["type"] == "tool_result"]
    assert results == [(call.id, (call.result, False)) for call in calls_in(SESSION)]


@needs_claude
def test_requests_for_claude_code_extend_each_other(claude_session: ClaudeSession) -> None:
    """It writes a text now as a string, now as a block with a mark, and forgets thoughts. All the rest is the same bytes."""
    requests = claude_session.script.requests
    assert_constant(requests, ["tools"])
    assert all(marks(body) <= 4 for body in requests)
    told = [[_comparable(raw) for raw in elements(member(body, "messages"))] for body in requests]
    for before, after in combinations(told, 2):
        assert after[: len(before)] == before
        assert len(after) > len(before)


def _comparable(raw: bytes) -> list[bytes]:
    """What Claude Code repeats of a message: the bytes of its blocks."""
    content = member(raw, "content")
    if content.startswith(b'"'):
        return [content]
    blocks = [without_marks(block) for block in elements(content)]
    kinds = [json.loads(block)["type"] for block in blocks]
    return [
        member(block, "text") if kind == "text" else block
        for kind, block in zip(kinds, blocks, strict=True)
        if kind != "thinking"
    ]


@needs_claude
def test_the_ledger_of_claude_code(claude_session: ClaudeSession) -> None:
    rows = claude_session.rows
    assert_recorded(rows, "claude-code", {BASH.id: BASH.id, BASH.name: BASH.name})
    used = {row["provider_response_id"]: (row["input_tokens"], row["output_tokens"]) for row in rows.token_usages}
    for number in range(1, len(HOPS) + 1):
        assert used[f"msg_{number}"] == (100 * number, number)
    assert claude_session.outcomes[0].result["usage"]["input_tokens"] == 100 * (1 + 2 + 3)


# --- Codex ------------------------------------------------------------------------------------------------------------

MODELS: Final = (codex.GPT_5, codex.GPT_6)


def codex_script(model: str) -> Iterator[Reply]:
    """The provider's part, in the order in which it is asked."""
    for number, hop in enumerate(HOPS, 1):
        thought = [codex.reasoning(f"rs_codex_{number}", f"gAAAAABp-encrypted-{number}")] if hop.thought else []
        words = [codex.message(f"msg_codex_{number}", hop.words)] if hop.words else []
        asked = [_codex_call(call, model) for call in hop.calls]
        yield codex.says(f"resp_{number}", *thought, *words, *asked, tokens=(100 * number, number), model=model)


def _codex_call(call: Call, model: str) -> codex.Item:
    if call is BASH:
        return codex.SHELL_CALLS[model]
    return codex.function_call(f"fc_{call.id}", call.id, call.name, json.loads(call.arguments))


@dataclass(frozen=True)
class CodexSession:
    model: str
    requests: list[bytes]
    outcomes: list[codex.Outcome]
    workspace: Path
    kept: bytes
    rows: Rows


@pytest.fixture(scope="module", params=MODELS)
def codex_session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CodexSession:
    """One session, played once."""
    model, workspace, home = request.param, tmp_path_factory.mktemp("workspace"), tmp_path_factory.mktemp("codex")
    with ThreadedProvider() as provider, gateway_before(provider) as gateway:
        provider.replies(*codex_script(model))

        def run(prompt: str, session: str | None) -> codex.Outcome:
            return codex.run(gateway.openai, prompt, workspace, model=model, home=home, resume=session)

        outcomes = play(gateway, run, lambda first: first.session)
        bodies = [received.body for received in provider.requests]
        return CodexSession(model, bodies, outcomes, workspace, kept_in(home), gateway.ledger(outcomes[0].session))


@needs_codex
def test_codex_does_not_notice(codex_session: CodexSession) -> None:
    for outcome, run in zip(codex_session.outcomes, SESSION, strict=True):
        assert outcome.status == 0, outcome.stderr
        assert outcome.session == codex_session.outcomes[0].session
        assert [item["text"] for item in outcome.items("agent_message")] == [hop.words for hop in run.hops if hop.words]
        assert outcome.items("error") == []
    assert [item["exit_code"] for item in codex_session.outcomes[0].items("command_execution")] == [0]
    assert_seen_as_one(codex_session.kept, codex_session.workspace)


@needs_codex
def test_the_provider_hears_all_that_it_said_to_codex(codex_session: CodexSession) -> None:
    model, items = codex_session.model, json.loads(member(codex_session.requests[-1], "input"))
    said = [item for item in items if item.get("role") == "assistant" or item["type"] in _BY_THE_MODEL]
    expected: list[codex.Item] = []
    for number, hop in enumerate(HOPS[:-1], 1):
        expected += [{"type": "reasoning", "encrypted_content": f"gAAAAABp-encrypted-{number}"}] if hop.thought else []
        expected += [{"type": "message", "id": f"msg_codex_{number}"}] if hop.words else []
        expected += [_codex_call(call, model) for call in hop.calls]
    assert [{name: item.get(name) for name in known} for item, known in zip(said, expected, strict=True)] == expected
    results = {item["call_id"]: item["output"] for item in items if item["type"].endswith("_output")}
    assert len(results) == len(calls_in(SESSION))
    for call in calls_in(SESSION):
        assert call.result in json.dumps(results[codex.TOOL_CALL_ID if call is BASH else call.id])


_BY_THE_MODEL: Final = ("reasoning", "function_call", "custom_tool_call")


@needs_codex
def test_requests_for_codex_extend_each_other(codex_session: CodexSession) -> None:
    """Codex repeats its history unchanged, so that all of it is the same bytes."""
    assert len(codex_session.requests) == len(HOPS)
    assert_extend_each_other(codex_session.requests, "input")
    assert_constant(codex_session.requests, ["tools"])


@needs_codex
def test_the_ledger_of_codex(codex_session: CodexSession) -> None:
    rows, shell = codex_session.rows, codex.SHELL_CALLS[codex_session.model]
    assert_recorded(rows, "codex", {BASH.id: codex.TOOL_CALL_ID, BASH.name: shell["name"]})
    used = [(row["provider_response_id"], row["input_tokens"], row["output_tokens"]) for row in rows.token_usages]
    assert used == [(f"resp_{number}", 100 * number, number) for number in range(1, len(HOPS) + 1)]
    assert codex_session.outcomes[0].usage["input_tokens"] == 100 * (1 + 2 + 3)
