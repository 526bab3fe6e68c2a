"""Passthrough requests about conversations with injected tools.

Truth: wire.md A1 ("inject tools here too or counts drift") and D5 (the public id of a response stands for the provider's
last one in `previous_response_id`, GET, cancel and input_items).
"""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
import pytest

from aibridge import Actor, MemoryRecorder, Provider, RequestBridge
from aibridge.history import MemoryHistory
from aibridge.injection import Injection
from aibridge.toolbox import MemoryToolbox
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest
from aibridge.wire.observer import ResponseHead
from tests.serving import ALICE, Call, call, scope
from tests.support.coding import gzip

JSON = [(b"content-type", b"application/json")]
CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_injected_1", "name": "bmcp_memory_look", "arguments": "{}"}
ANSWER = {"type": "message", "id": "msg_22222222", "role": "assistant", "content": [{"type": "output_text", "text": "So."}]}
PUBLIC, LAST = "resp_11111111", "resp_22222222"


def response(identity: str, *output: Any, **members: Any) -> dict[str, Any]:
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    found = {"id": identity, "object": "response", "status": "completed", "output": list(output), "usage": usage}
    return found | {"tools": [{"type": "function", "name": "bmcp_memory_look"}], **members}


class Stage:
    """A bridge with one tool, and a provider that keeps responses."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Callable[[UpstreamRequest], tuple[int, Any]]] = {}
        self.upstream = MemoryUpstream(self._answer)
        providers = [Provider.anthropic(), Provider.openai()]
        self.history = MemoryHistory()
        injection = Injection(MemoryToolbox({"look": look}), self.history)
        self.bridge = RequestBridge(providers, MemoryRecorder(), upstream=self.upstream, injection=injection)

    def _answer(self, request: UpstreamRequest) -> MemoryResponse:
        path = request.url.partition("/v1")[2]
        found = self.answers.get((request.method, path))
        status, body = (404, {"error": {"message": path}}) if found is None else found(request)
        return MemoryResponse(ResponseHead(status, JSON), [json.dumps(body).encode()])

    def will(self, method: str, path: str, body: Any, status: int = 200) -> None:
        self.answers[method, path] = lambda _: (status, body)

    async def ask(
        self, method: str, path: str, *pieces: bytes, headers: Any = (), actor: Actor = ALICE, query: bytes = b""
    ) -> Call:
        length = [(b"content-length", b"%d" % sum(map(len, pieces)))] if pieces else []
        return await call(self.bridge, scope(method, path, [*length, *headers], query=query), *pieces, actor=actor)

    @property
    def asked(self) -> list[str]:
        return [f"{request.method} {request.url.partition('/v1')[2]}" for request in self.upstream.requests]

    def last_body(self) -> Any:
        body = self.upstream.requests[-1].body
        assert isinstance(body, bytes)
        return json.loads(body)


async def look(_: Mapping[str, Any]) -> str:
    return "found"


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    found = Stage()
    async with found.bridge:
        yield found


async def two_turns(stage: Stage) -> None:
    """A response of two turns, as the client knows it: `PUBLIC`; the provider's last is `LAST`."""
    turns = [response(PUBLIC, CALL), response(LAST, ANSWER)]
    stage.answers["POST", "/responses"] = lambda _: (200, turns.pop(0))
    told = await stage.ask("POST", "/openai/v1/responses", b'{"model":"gpt","input":"hi"}')
    assert told.json()["id"] == PUBLIC
    stage.upstream.requests.clear()


# ---- counting tokens ----


@pytest.mark.parametrize(
    ("path", "members"),
    [
        ("/anthropic/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/openai/v1/responses/input_tokens", {"input": "hi"}),
    ],
)
async def test_counts_count_the_tools(stage: Stage, path: str, members: dict[str, Any]) -> None:
    stage.will("POST", path.partition("/v1")[2], {"input_tokens": 7})
    body = json.dumps({"model": "m", **members}).encode()
    told = await stage.ask("POST", path, body)
    assert (told.status, told.json()) == (200, {"input_tokens": 7})
    assert [tool["name"] for tool in stage.last_body()["tools"]] == ["bmcp_memory_look"]
    assert (await stage.ask("POST", path, gzip(body), headers=[(b"content-encoding", b"gzip")])).status == 200
    assert "tools" in stage.last_body()
    assert b"content-encoding" not in dict(stage.upstream.requests[-1].headers)


async def test_what_cannot_be_counted_is_refused(stage: Stage) -> None:
    assert (await stage.ask("POST", "/anthropic/v1/messages/count_tokens", b"oops")).status == 400
    assert stage.asked == []


# ---- responses that the provider keeps ----


async def test_a_response_of_several_turns_is_got_as_the_client_knows_it(stage: Stage) -> None:
    await two_turns(stage)
    stage.will("GET", f"/responses/{LAST}", response(LAST, ANSWER, previous_response_id=None))
    found = (await stage.ask("GET", f"/openai/v1/responses/{PUBLIC}")).json()
    assert (found["id"], found["output"], found["tools"]) == (PUBLIC, [ANSWER], [])
    assert stage.asked == [f"GET /responses/{LAST}"]
    assert dict(stage.upstream.requests[-1].headers)[b"accept-encoding"] == b"identity"


async def test_the_query_goes_along(stage: Stage) -> None:
    await two_turns(stage)
    await stage.ask("GET", f"/openai/v1/responses/{PUBLIC}", query=b"include=x")
    assert stage.asked == [f"GET /responses/{LAST}?include=x"]


async def test_it_is_cancelled_where_it_runs(stage: Stage) -> None:
    await two_turns(stage)
    stage.will("POST", f"/responses/{LAST}/cancel", response(LAST, ANSWER, status="cancelled"))
    found = (await stage.ask("POST", f"/openai/v1/responses/{PUBLIC}/cancel")).json()
    assert (found["id"], found["status"]) == (PUBLIC, "cancelled")


async def test_its_input_lacks_what_is_hidden(stage: Stage) -> None:
    await two_turns(stage)
    said = {"type": "message", "role": "user", "content": "hi"}
    output = {"type": "function_call_output", "call_id": "call_injected_1", "output": "found"}
    stage.will("GET", f"/responses/{LAST}/input_items", {"object": "list", "data": [output, CALL, said]})
    found = await stage.ask("GET", f"/openai/v1/responses/{PUBLIC}/input_items")
    assert found.json() == {"object": "list", "data": [said]}


async def test_all_of_it_is_deleted(stage: Stage) -> None:
    await two_turns(stage)
    for identity in (PUBLIC, LAST):
        stage.will("DELETE", f"/responses/{identity}", {"id": identity, "object": "response.deleted", "deleted": True})
    found = (await stage.ask("DELETE", f"/openai/v1/responses/{PUBLIC}")).json()
    assert found == {"id": PUBLIC, "object": "response.deleted", "deleted": True}
    assert stage.asked == [f"DELETE /responses/{PUBLIC}", f"DELETE /responses/{LAST}"]


@pytest.mark.parametrize("body", [b"{}", b""])
async def test_all_of_it_is_deleted_also_by_a_request_with_a_body(stage: Stage, body: bytes) -> None:
    """Some clients send one with each request (RFC 9110 section 9.3.5 gives it no meaning, and does not forbid it)."""
    await two_turns(stage)
    for identity in (PUBLIC, LAST):
        stage.will("DELETE", f"/responses/{identity}", {"id": identity, "object": "response.deleted", "deleted": True})
    headers = [(b"transfer-encoding", b"chunked")]
    found = (await stage.ask("DELETE", f"/openai/v1/responses/{PUBLIC}", body[:1], body[1:], headers=headers)).json()
    assert found["id"] == PUBLIC
    assert stage.asked == [f"DELETE /responses/{PUBLIC}", f"DELETE /responses/{LAST}"]
    assert [request.body for request in stage.upstream.requests[-2:]] == [body, body]


async def test_a_conversation_goes_on_from_the_last_turn(stage: Stage) -> None:
    await two_turns(stage)
    stage.will("POST", "/responses", response("resp_33333333", ANSWER, previous_response_id=LAST))
    body = json.dumps({"model": "gpt", "input": "and?", "previous_response_id": PUBLIC}).encode()
    found = (await stage.ask("POST", "/openai/v1/responses", body)).json()
    assert stage.last_body()["previous_response_id"] == LAST
    assert found["previous_response_id"] == PUBLIC


async def test_a_conversation_goes_on_after_its_hidden_part_has_expired(stage: Stage) -> None:
    await two_turns(stage)
    for key, memory in stage.history.memories.items():
        stage.history.memories[key] = msgspec.structs.replace(memory, data=None)
    stage.will("POST", "/responses", response("resp_33333333", ANSWER, previous_response_id=LAST))
    body = json.dumps({"model": "gpt", "input": "and?", "previous_response_id": PUBLIC}).encode()
    await stage.ask("POST", "/openai/v1/responses", body)
    assert stage.last_body()["previous_response_id"] == LAST
    stage.will("GET", f"/responses/{LAST}", response(LAST, ANSWER))
    assert (await stage.ask("GET", f"/openai/v1/responses/{PUBLIC}")).json()["output"] == [ANSWER]


async def test_errors_come_as_they_are(stage: Stage) -> None:
    await two_turns(stage)
    told = await stage.ask("GET", f"/openai/v1/responses/{PUBLIC}")
    assert (told.status, told.json()) == (404, {"error": {"message": f"/responses/{LAST}"}})


async def test_what_is_nothing_to_edit_comes_as_it_is(stage: Stage) -> None:
    await two_turns(stage)
    stage.will("GET", f"/responses/{LAST}", ["odd"])
    assert (await stage.ask("GET", f"/openai/v1/responses/{PUBLIC}")).json() == ["odd"]


async def test_other_peoples_responses_are_not_known(stage: Stage) -> None:
    await two_turns(stage)
    await stage.ask("GET", f"/openai/v1/responses/{PUBLIC}", actor=Actor("bob"))
    assert stage.asked == [f"GET /responses/{PUBLIC}"]


@pytest.mark.parametrize("path", ["/v1/responses/resp_unknown", "/v1/responses/compact"])
async def test_what_nobody_remembers_goes_as_it_is(stage: Stage, path: str) -> None:
    stage.will("GET", path.removeprefix("/v1"), response("resp_unknown", CALL))
    assert (await stage.ask("GET", "/openai" + path)).json() == response("resp_unknown", CALL)
