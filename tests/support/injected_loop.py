"""The engine, let loose on scripted turns (`tests.support.injected`), and the official Python SDKs as judges of it.

The whole bridge runs in the test's own event loop, without a network: `InnerLoop` is a provider that says one turn after the
other, a bridge with two injected tools, and a client that gets bytes. The tools' results, and all that a test lets a model
say in calls of them, have a word in them that no client may ever see: `SECRET`.
"""

import json
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any, Final, Self

import anthropic
import httpx2
import openai

from aibridge import MemoryRecorder, Provider, RequestBridge, as_actor
from aibridge.asgi import App, Receive, Scope, Send
from aibridge.calling import Tracer
from aibridge.history import MemoryHistory
from aibridge.injection import Injection
from aibridge.records import ToolUsage
from aibridge.toolbox import Function, MemoryToolbox
from aibridge.tools import Outcome
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest
from aibridge.wire.observer import ResponseHead
from tests.serving import ALICE, Call, scope

from .coding import ENCODERS, zstd
from .injected import Breaks, Calls, Dialect, Failure, Json, Refuses, Seen, Stop, Turn, Unreachable, usage_of
from .jssdk import JavaScript

Split = Callable[[bytes], Iterable[bytes]]
Watch = Callable[[bytes], None]

SECRET: Final = "s3cret"
LOOK: Final = "bmcp_memory_look"
FAIL: Final = "bmcp_memory_fail"


async def look(arguments: Mapping[str, Any]) -> str:
    """Looks s3cret things up."""
    return f"found {arguments['for']}"


async def fail(arguments: Mapping[str, Any]) -> Outcome:
    """Fails s3cretly."""
    return Outcome.failed(f"no {arguments['for']}")


TOOLS: Final[Mapping[str, Function]] = {"look": look, "fail": fail}


def looks(id: str) -> Calls:
    """A call of the injected tool that finds what it looks for. Written by JSON's rules, but not as an encoder would."""
    return Calls(f"{id}_{SECRET}", LOOK, f'{{"for": "{SECRET} {id}",  "weight": 1e2}}')


def fails(id: str) -> Calls:
    """A call of the injected tool that fails."""
    return Calls(f"{id}_{SECRET}", FAIL, f'{{"for": "{SECRET} {id}"}}')


def answer_to(call: Calls) -> tuple[str, str, bool]:
    """What comes of a call: its id, the words of the result, whether it failed."""
    what = json.loads(call.arguments)["for"]
    return (call.id, f"no {what}", True) if call.tool == FAIL else (call.id, f"found {what}", False)


def is_injected(call: Calls) -> bool:
    return call.tool in (LOOK, FAIL)


class InnerLoop:
    """A bridge between a client and a provider of one dialect: ``async with InnerLoop(CHAT, turn(1, ...)) as loop``.

    The provider answers each request with the next of `script`, its bytes as `split` says, one event at a time where that
    says nothing, compressed where there is a `coding`. `rules` are those of the `Injection`; ``tools=None`` means that
    there is none.
    """

    def __init__(
        self,
        dialect: Dialect,
        *script: Turn | Failure,
        split: Split | None = None,
        coding: str = "",
        tools: Mapping[str, Function] | None = TOOLS,
        provider: Provider | None = None,
        tracer: Tracer | None = None,
        **rules: Any,
    ) -> None:
        self.dialect = dialect
        self.recorder = MemoryRecorder()
        self.upstream = MemoryUpstream(self._answer)
        self.sent = b""
        self._script = iter(script)
        self._split = split
        self._coding = coding
        injection = None if tools is None else Injection(MemoryToolbox(tools), MemoryHistory(), **rules)
        providers = [Provider.anthropic(), Provider.openai()] if provider is None else [provider]
        self.bridge = RequestBridge(providers, self.recorder, upstream=self.upstream, injection=injection, tracer=tracer)

    async def __aenter__(self) -> Self:
        await self.bridge.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.bridge.__aexit__(kind, error, trace)

    def begin(self, body: bytes, headers: Sequence[tuple[bytes, bytes]] = (), *, watch: Watch | None = None) -> Call:
        """A request under way. Each piece of its response is shown to `watch`, too."""
        app = self.bridge if watch is None else _watched(self.bridge, watch)
        return Call(app, as_actor(scope("POST", self.dialect.path, headers), ALICE), [body])

    async def ask(self, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> Call:
        """A request and its whole response."""
        call = await self.begin(body, headers).over()
        length = dict(call.headers).get(b"content-length")
        assert length is None or int(length) == len(call.body)
        return call

    @property
    def requests(self) -> list[bytes]:
        """The bodies that the provider got."""
        return [_body_of(request) for request in self.upstream.requests]

    def _answer(self, request: UpstreamRequest) -> MemoryResponse:
        said = next(self._script)
        if isinstance(said, Unreachable):
            raise said.reason
        if isinstance(said, Refuses):
            headers = [(b"content-type", b"application/json"), *said.headers]
            return MemoryResponse(ResponseHead(said.status, headers), [self.dialect.error(said.message)])
        asked = json.loads(_decoded(request))
        stream = asked.get("stream") is True
        headers = [(b"content-type", b"text/event-stream" if stream else b"application/json"), (b"x-hop", b"1")]
        one = said.turn if isinstance(said, Breaks) else said
        events = list(self.dialect.events(one, asked)) if stream else [self.dialect.body(one, asked)]
        if isinstance(said, Breaks):
            whole = b"".join(events)
            ending = [] if said.reason is None else [said.reason]
            return MemoryResponse(ResponseHead(200, headers), [whole[: len(whole) * 2 // 3], *ending])
        self.sent = b"".join(events)
        if self._coding:
            headers.append((b"content-encoding", self._coding.encode()))
            events = [ENCODERS[self._coding](self.sent)]
        if not stream:
            headers.append((b"content-length", b"%d" % len(events[0])))
        return MemoryResponse(ResponseHead(200, headers), self._split(b"".join(events)) if self._split else events)

    # --- what came of it ---

    async def seen(self, call: Call, js: JavaScript, *, stream: bool) -> Seen:
        """What both official SDKs make of a response. They must agree; wherever JavaScript's loses thoughts, on all else."""
        seen = self.dialect.seen(python_final(self.dialect, call, stream=stream))
        final = await js.read(self.dialect.format, pieces_of(call), stream=stream, status=call.status, headers=_plain(call))
        other = self.dialect.seen(final)
        if self.dialect.format == "chat":  # of a member that it does not know it keeps the last piece (test_jssdk.py)
            assert other.without_thoughts() == seen.without_thoughts()
        else:
            assert other == seen
        return seen

    @property
    def invocations(self) -> list[tuple[str, str | None, str | None, str | None]]:
        """The injected calls of the ledger: the tool's own name, arguments, call id, error."""
        rows = [row for row in self.recorder.tool_usages if row.injected]
        assert all(row.server_url == "memory:memory" and row.metadata["server"] == "memory" for row in rows)
        assert all(row.metadata["duration_ms"] >= 0 for row in rows)
        return [(row.tool, row.input, row.tool_call_id, row.invocation_error) for row in rows]

    @property
    def client_calls(self) -> list[ToolUsage]:
        return [row for row in self.recorder.tool_usages if not row.injected]

    @property
    def usages(self) -> list[tuple[str | None, int | None, int | None, int | None, str]]:
        """The ledger's usage rows: response id, input, cached, output, completeness."""
        return [
            (row.provider_response_id, row.input_tokens, row.cache_read_input_tokens, row.output_tokens, row.completeness)
            for row in self.recorder.token_usages
        ]

    @property
    def ended(self) -> list[tuple[str, int | None]]:
        """How the interceptions ended: each did, once."""
        ends = self.recorder.ended
        assert [end.interception_id for end in ends] == [start.id for start in self.recorder.interceptions]
        return [(end.status, end.http_status) for end in ends]


def recorded(calls: Iterable[Calls]) -> list[tuple[str, str, str, str | None]]:
    """What the ledger must have of injected calls, in the form of `InnerLoop.invocations`."""
    return [
        (call.tool.rpartition("_")[2], call.arguments, call.id, words if failed else None)
        for call in calls
        for _, words, failed in [answer_to(call)]
    ]


def shown(dialect: Dialect, turns: Iterable[Turn], *, usage: tuple[int, int, int] | None, stop: Stop = "end") -> Seen:
    """What the client must see of turns: all but the injected calls, under the names of the first."""
    said = [one for turn in turns for one in turn.said if not (isinstance(one, Calls) and is_injected(one))]
    return Seen(dialect.id_of(1), "m-1", dialect.shown(said), stop, usage)


def assert_hidden(call: Call) -> None:
    """No byte of an injected tool's name, description, call ids, arguments or results."""
    for secret in (SECRET, "bmcp_", "memory"):
        assert secret.encode() not in call.body


def assert_provider_got(dialect: Dialect, requests: Sequence[bytes], turns: Iterable[Turn]) -> None:
    """Each request is the one before it, byte for byte, and the turn with the results (wire.md D4)."""
    for before, after, said in zip(requests, requests[1:], turns, strict=False):
        assert dialect.said_until(after).startswith(dialect.said_until(before))
        there = len(json.loads(before)[dialect.array])
        results = [answer_to(call) for call in said.calls]
        assert json.loads(after)[dialect.array][there:] == dialect.appended(said, results)
        assert_as_written(after, said.calls)


def assert_as_written(body: bytes, calls: Iterable[Calls]) -> None:
    """The arguments stand in a request as the provider wrote them: in an object, or in a string."""
    for call in calls:
        assert call.arguments in body.decode() or json.dumps(call.arguments) in body.decode()


def ledger_usage(dialect: Dialect, number: int) -> tuple[str, int, int, int, str]:
    """The row of a turn, in the form of `InnerLoop.usages`. Only Messages counts the cached apart (wire.md A8, B4, C4)."""
    read, cached, written = usage_of(number)
    return dialect.id_of(number), read if dialect.format == "messages" else read - cached, cached, written, "complete"


def pieces_of(call: Call) -> list[bytes]:
    """The body in the pieces in which the client got it."""
    return [message["body"] for message in call.sent[1:] if message.get("body")]


def _watched(app: App, watch: Watch) -> App:
    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: MutableMapping[str, Any]) -> None:
            await send(message)
            watch(message.get("body", b""))

        await app(scope, receive, sending)

    return watched


def _body_of(request: UpstreamRequest) -> bytes:
    assert isinstance(request.body, bytes)
    return request.body


def _decoded(request: UpstreamRequest) -> bytes:
    """What a provider reads of a request that came compressed by zstd or not at all."""
    compressed = (b"content-encoding", b"zstd") in list(request.headers)
    return zstd.decompress(_body_of(request)) if compressed else _body_of(request)


def _plain(call: Call) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in call.headers if name != b"content-length"}


# --- the official SDKs ------------------------------------------------------------------------------------------------


class _Canned(httpx2.BaseTransport):
    """Answers with what it was given."""

    def __init__(self) -> None:
        self.response = httpx2.Response(500)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return self.response


_CANNED: Final = _Canned()
_NO_CERTIFICATES: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@cache
def _anthropic() -> anthropic.Anthropic:
    http_client = anthropic.DefaultHttpxClient(transport=_CANNED, verify=_NO_CERTIFICATES)
    return anthropic.Anthropic(api_key="k", base_url="http://127.0.0.1", max_retries=0, http_client=http_client)


@cache
def _openai() -> openai.OpenAI:
    http_client = openai.DefaultHttpxClient(transport=_CANNED, verify=_NO_CERTIFICATES)
    return openai.OpenAI(api_key="k", base_url="http://127.0.0.1/v1", max_retries=0, http_client=http_client)


def python_final(dialect: Dialect, call: Call, *, stream: bool) -> Json:
    """What the Python SDK's own stream helper accumulates of a response, or what it parses. Raises what that raises."""
    _CANNED.response = httpx2.Response(call.status, headers=call.headers, stream=_Pieces(call))
    final = (_streamed if stream else _parsed)(dialect)
    parsed: Json = final.to_dict(mode="json")
    return parsed


class _Pieces(httpx2.SyncByteStream):
    """A body as it came."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __iter__(self) -> Iterator[bytes]:
        return iter(pieces_of(self._call))


def _streamed(dialect: Dialect) -> Any:
    if dialect.format == "messages":
        with _anthropic().messages.stream(model="m", max_tokens=9, messages=[]) as message:
            return message.get_final_message()
    if dialect.format == "chat":
        with _openai().chat.completions.stream(model="m", messages=[]) as completion:
            return completion.get_final_completion()
    with _openai().responses.stream(model="m", input="x") as response:
        return response.get_final_response()


def _parsed(dialect: Dialect) -> Any:
    if dialect.format == "messages":
        return _anthropic().messages.create(model="m", max_tokens=9, messages=[])
    if dialect.format == "chat":
        return _openai().chat.completions.create(model="m", messages=[])
    return _openai().responses.create(model="m", input="x")
