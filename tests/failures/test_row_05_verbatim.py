"""Row 5 of failures.md: neither body nor headers are rewritten.

Truth: the row; wire.md rules 1 and 2, A1, E (what a decode and re-encode does to JSON); clients.md 1 and 2 for the headers;
RFC 9110 7.6.1 for those that stop here. Issue 2: a body that is not a JSON object is refused, one that is, however odd its
values, is forwarded.
"""

import json
from collections.abc import Sequence

import pytest

from tests.support.gateway import Scene
from tests.support.provider import Received, Reply, bytewise
from tests.support.rawclient import Head
from tests.support.streams import PROVIDERS
from tests.support.traffic import named

ROUTES = ["/anthropic/v1/messages", "/openai/v1/chat/completions", "/openai/v1/responses"]

# By what is odd about it. Each is one member more in a request that is otherwise plain.
ODD: dict[str, bytes] = {
    "white space": b'"x" \t:\r\n [ 1 ,\n\n2 ] ',
    "duplicate keys": b'"x":1,"x":2,"metadata":{"a":1,"a":2}',
    "floats": b'"x":[1e400,-0,-0.0,1.0e2,1E-7,100000000000000000000.0,0.1000000000000000055511151231257827]',
    "a long integer": b'"x":' + b"9" * 5000,
    "NUL": b'"x":"a\\u0000b"',
    "lone surrogates": b'"x":"\\ud800 \\udfff \\ud83c\\udf0d"',
    "escapes": b'"x":"\\/ \\u00e9 \\u0041 \\b\\f"',
    "separators of lines": '"x":"\u2028\u2029\u0085"'.encode(),
    "a raw control character": b'"x":"\x0b"',
    "not UTF-8": b'"x":"\xff\xfe\xe9"',
    "not a number": b'"x":[NaN,Infinity,-Infinity]',
    "depth": b'"x":' + b"[" * 200 + b"]" * 200,
    "great depth": b'"x":' + b"[" * 20_000 + b"]" * 20_000,
    "nulls": b'"x":null,"stop":null,"tools":null,"metadata":null,"stream_options":null',
    "empty strings": b'"":"","x":""',
    "unknown members": b'"x_new_feature":{"type":"y"},"betas":["z"],"anthropic_version":"q"',
    "sampling": b'"temperature":1.0,"top_p":0.9,"top_k":5',
    "members of other types": b'"metadata":"m","tools":{},"system":7,"stream_options":[],"tool_choice":3',
}


def asking(route: str, member: bytes, stream: bool = False) -> bytes:
    question = b'"input":"Hi"' if route.endswith("responses") else b'"messages":[{"role":"user","content":"Hi"}]'
    return b'{ "model" : "m-1",' + member + b", " + question + (b',"stream":true' if stream else b"") + b"}\n"


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.replace(" ", "-"))
@pytest.mark.parametrize("route", ROUTES)
async def test_odd_bodies_pass_both_ways(route: str, odd: str, scene: Scene) -> None:
    """A provider may be as odd as a client. What can be read is recorded, and what cannot be is no reason to fail."""
    body = asking(route, ODD[odd])
    response = b'{"id":"r_1","type":"message",' + ODD[odd] + b', "model":"m-1" }\r\n'
    scene.reply(Reply.json(response))
    answer = await scene.post(route, body)
    assert (answer.head.status, answer.complete) == (200, True)
    assert answer.body == response
    assert scene.requests[0].body == body
    assert scene.ledger().interception["status"] == "completed"


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.replace(" ", "-"))
async def test_what_can_be_read_of_an_odd_body_is_recorded(odd: str, scene: Scene) -> None:
    scene.reply(Reply.json(b"{}"))
    await scene.post(ROUTES[0], asking(ROUTES[0], ODD[odd]))
    row = scene.ledger().interception
    assert row["model"] == "m-1" or row["metadata"]["notes"]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.replace(" ", "-"))
async def test_odd_streams_pass(odd: str, scene: Scene) -> None:
    """In a stream of two events, one of them odd: nothing is lost, and the other is read."""
    recording = named("messages-text-stream")
    odd_event = b'data: {"type":"x_odd",' + ODD[odd].replace(b"\r\n", b"").replace(b"\n", b"") + b"}\n\n"
    stream = odd_event + recording.response
    scene.reply(Reply.stream([stream]))
    answer = await scene.post(ROUTES[0], recording.request)
    assert (answer.body, answer.complete) == (stream, True)
    rows = scene.ledger()
    assert rows.interception["status"] == "completed"
    assert rows.token_usage["output_tokens"] == 15


@pytest.mark.parametrize("body", [b"", b"[]", b'"text"', b"7", b"null", b'{"model":', b"model=m", b'{"a":1}}', b"\x00"])
@pytest.mark.parametrize("route", ROUTES)
async def test_what_is_no_json_object_is_refused(route: str, body: bytes, scene: Scene) -> None:
    """Here, with the provider's words: it never gets there, and nothing was intercepted."""
    answer = await scene.post(route, body)
    assert answer.head.status == 400
    error = json.loads(answer.body)
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"]
    assert error.get("type") == ("error" if "anthropic" in route else None)
    assert scene.requests == []
    assert scene.ledger().interceptions == []


async def test_a_byte_order_mark_passes(scene: Scene) -> None:
    body = b"\xef\xbb\xbf" + asking(ROUTES[0], b'"x":1')
    scene.reply(Reply.json(b"{}"))
    assert (await scene.post(ROUTES[0], body)).head.status == 200
    assert scene.requests[0].body == body


@pytest.mark.parametrize("piece", [1, 7, 4096])
async def test_a_chunked_request_arrives_whole(piece: int, scene: Scene) -> None:
    body = asking(ROUTES[0], b'"x":"' + b"y" * 3000 + b'"')
    scene.reply(Reply.json(b"{}"))
    pieces = [body[at : at + piece] for at in range(0, len(body), piece)]
    async with scene.client() as client:
        await client.send("POST", ROUTES[0], scene.lines(("Transfer-Encoding", "chunked")))
        await client.write(b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in pieces) + b"0\r\n\r\n")
        assert (await client.answer()).head.status == 200
    assert scene.requests[0].body == body


async def test_the_same_request_a_hundred_times(scene: Scene) -> None:
    """One difference in a hundred and the prompt cache is paid for again."""
    recording = named("messages-claude-code-request")
    scene.handler = lambda _: recording.reply()
    async with scene.client() as client:
        for _ in range(100):
            await client.request("POST", ROUTES[0], scene.lines(), recording.request)
    assert {received.body for received in scene.requests} == {recording.request}
    assert len({received.headers for received in scene.requests}) == 1


# --- headers ----------------------------------------------------------------------------------------------------------

REQUEST_HEADERS = [
    ("User-Agent", "claude-cli/2.1.330 (external, sdk-cli)"),
    ("Accept", "application/json"),
    ("Accept-Encoding", "gzip, deflate, br, zstd"),
    ("anthropic-version", "2023-06-01"),
    ("anthropic-beta", "oauth-2025-04-20,fine-grained-tool-streaming-2025-05-14, x-future-2027-01-01"),
    ("anthropic-beta", "second-line-2026-01-01"),
    ("Anthropic-Dangerous-Direct-Browser-Access", "true"),
    ("anthropic-workspace-id", "wrkspc_1"),
    ("OpenAI-Beta", "responses_websockets=2026-02-06"),
    ("OpenAI-Organization", "org-1"),
    ("openai-project", "proj_1"),
    ("x-codex-turn-state", 'a=b; c="d"'),
    ("x-codex-turn-metadata", '{"turn_id":"0199","a":[1, 2]}'),
    ("x-codex-window-id", "w:1"),
    ("X-Claude-Code-Agent-Id", "agent-1"),
    ("X-Stainless-Retry-Count", "0"),
    ("x-app", "cli"),
    ("originator", "codex_exec"),
    ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ("X-Empty", ""),
    ("x-long", "l" * 9000),
    ("x-utf8", "h\u00c3\u00a9llo"),  # two bytes of UTF-8, each as the character that Latin-1 makes of it
    ("Content-Language", "en, de"),
]

RESPONSE_HEADERS = [
    ("Date", "Sat, 21 Nov 2026 10:00:00 GMT"),
    ("Server", "cloudflare"),
    ("request-id", "req_011"),
    ("x-request-id", "req_012"),
    ("anthropic-organization-id", "0e1f"),
    ("anthropic-ratelimit-requests-limit", "4000"),
    ("anthropic-ratelimit-tokens-reset", "2026-11-21T10:00:01Z"),
    ("openai-processing-ms", "310"),
    ("openai-model", "gpt-5.4-other"),
    ("x-ratelimit-remaining-tokens", "149984"),
    ("x-codex-turn-state", "opaque=="),
    ("x-should-retry", "false"),
    ("retry-after", "1.5"),
    ("Via", "1.1 google"),
    ("Set-Cookie", "__cf_bm=1; path=/"),
    ("Set-Cookie", "_cfuvid=2; path=/"),
    ("Strict-Transport-Security", "max-age=1"),
    ("X-Unknown", "one"),
    ("x-unknown", "two"),
    ("X-Empty", ""),
    ("x-utf8", "h\u00c3\u00a9llo"),
    ("x-latin1", "h\u00e9llo"),
]


def sent_on(received: Received) -> list[tuple[str, str]]:
    """What reached the provider, but for the fields that belong to its own connection."""
    fields = [(name.decode().lower(), value.decode("latin-1")) for name, value in received.headers]
    return [field for field in fields if field[0] not in ("host", "content-length", "connection")]


def lower(headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in headers]


def end_to_end(head: Head) -> list[tuple[str, str]]:
    return [field for field in head.headers if field[0] not in ("transfer-encoding", "connection", "content-length")]


@pytest.mark.parametrize("name", ["messages-text-stream", "chat-text-blocking", "responses-text-stream"])
async def test_headers_pass_both_ways(name: str, scene: Scene) -> None:
    """Values, repetitions and order; nothing is added, in either direction."""
    recording = named(name)
    reply = recording.reply(bytewise if recording.streams else lambda body: [body])
    kind = ("Content-Type", recording.content_type)
    scene.reply(Reply(200, [kind, *RESPONSE_HEADERS], reply.body, reply.framing))
    headers = scene.lines(*REQUEST_HEADERS)
    answer = await scene.post(f"/{PROVIDERS[recording.format]}{recording.path}", recording.request, headers)
    assert sent_on(scene.requests[0]) == lower(headers)
    assert end_to_end(answer.head) == lower([kind, *RESPONSE_HEADERS])


async def test_a_header_in_latin1_passes(scene: Scene) -> None:
    """A field value is bytes (RFC 9110 5.5): those of a header that is not UTF-8 are nobody's to change either."""
    scene.reply(Reply.json(b"{}"))
    await scene.post(ROUTES[0], b'{"model":"m"}', [("x-latin1", "h\u00e9llo"), ("x-both", "\u00e9 \u00c3\u00a9")])
    assert scene.requests[0].header("x-latin1") == ["h\u00e9llo"]
    assert scene.requests[0].header("x-both") == ["\u00e9 \u00c3\u00a9"]


async def test_nothing_is_added_to_a_bare_request(scene: Scene) -> None:
    """Codex sends no Accept-Encoding: a provider that then got one could answer with what the client cannot read."""
    scene.reply(Reply.json(b"{}"))
    async with scene.client() as client:
        await client.request("POST", ROUTES[2], list(scene.headers.items()), b'{"model":"m"}')
    assert sent_on(scene.requests[0]) == list(scene.headers.items())


async def test_hop_by_hop_headers_stop_here(scene: Scene) -> None:
    ours = [
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "1"),
        ("Keep-Alive", "timeout=5"),
        ("TE", "trailers"),
        ("Proxy-Authorization", "Basic Zm9vOmJhcg=="),
        ("Proxy-Connection", "keep-alive"),
    ]
    theirs = [("Connection", "X-Back"), ("X-Back", "1"), ("Keep-Alive", "timeout=9"), ("Proxy-Authenticate", "Basic")]
    scene.reply(Reply.json(b"{}", headers=[*theirs, ("X-Kept", "1")]))
    answer = await scene.post(ROUTES[0], b'{"model":"m"}', [*ours, ("X-Kept", "1")])
    assert sent_on(scene.requests[0]) == lower(scene.lines(("X-Kept", "1")))
    assert end_to_end(answer.head) == [("content-type", "application/json"), ("x-kept", "1")]


async def test_the_host_is_the_providers(scene: Scene) -> None:
    scene.reply(Reply.json(b"{}"))
    await scene.post(ROUTES[0], b'{"model":"m"}', [("Host", f"localhost:{scene.gateway.port}")])
    assert scene.requests[0].header("host") == [f"127.0.0.1:{scene.stage.provider.port}"]


QUERIES = ["?beta=true", "?a=1&a=2&b", "?x=%2F%20+%C3%A9&y=%zz", "?", "?q=a?b"]


@pytest.mark.parametrize("query", QUERIES)
async def test_queries_pass_as_they_are(query: str, scene: Scene) -> None:
    scene.handler = lambda _: Reply.json(b"{}")
    assert (await scene.post(ROUTES[0] + query, b'{"model":"m"}')).head.status == 200
    assert (await scene.post("/anthropic/v1/messages/count_tokens" + query, b'{"model":"m"}')).head.status == 200
    assert [received.query for received in scene.requests] == [query.removeprefix("?")] * 2


# --- routes that pass through -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_passthrough_body_is_not_read(framing: str, scene: Scene) -> None:
    """Any bytes, in both directions, JSON or not."""
    body, response = bytes(range(256)) * 300, bytes(reversed(range(256))) * 300
    headers = scene.lines(("Content-Type", "multipart/form-data; boundary=x"), *REQUEST_HEADERS)
    scene.reply(Reply(201, [("Content-Type", "application/x-ndjson"), *RESPONSE_HEADERS], [response], "chunked"))
    async with scene.client() as client:
        if framing == "chunked":
            await client.send("POST", "/openai/v1/conversations", [*headers, ("Transfer-Encoding", "chunked")])
            await client.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        else:
            await client.send("POST", "/openai/v1/conversations", headers, body)
        answer = await client.answer()
    assert (answer.head.status, answer.body, answer.complete) == (201, response, True)
    assert end_to_end(answer.head) == lower([("Content-Type", "application/x-ndjson"), *RESPONSE_HEADERS])
    (received,) = scene.requests
    assert received.body == body
    assert [field for field in sent_on(received) if field[0] != "transfer-encoding"] == lower(headers)


@pytest.mark.parametrize("path", ["/v1/models/claude%2Dopus", "/v1/models/meta%3Allama", "/v1/models/a:b@c"])
async def test_paths_pass_as_they_are_encoded(path: str, scene: Scene) -> None:
    scene.reply(Reply.json(b"{}"))
    async with scene.client() as client:
        assert (await client.request("GET", "/anthropic" + path, scene.lines())).head.status == 200
    assert scene.requests[0].target == path
