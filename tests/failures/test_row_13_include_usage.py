"""Row 13 of failures.md: a usage chunk that the client did not ask for crashes clients. Ours is taken out again.

Truth: the row; wire.md B2 (usage is one extra chunk with empty ``choices`` just before ``[DONE]``, and the other chunks
carry ``"usage": null``); clients.md 3 for who does not ask; design.md 4 (the one exception to verbatim relay).
"""

import json
from collections.abc import Callable

import pytest

from tests.support.gateway import Scene
from tests.support.provider import Gate, Reply, Wait, at_random, bytewise, whole
from tests.support.rawclient import Answer
from tests.support.sdks import openai_client
from tests.support.streams import events
from tests.support.traffic import named
from tests.test_e2e_traffic import check_splice

CHAT = "/openai/v1/chat/completions"
STREAM = named("chat-text-stream")
EXTRA, DONE = events(STREAM.response)[-2:]

# Every chunk without its null, and without the chunk that only brings the usage.
WITHOUT_USAGE = b"".join(events(STREAM.response)[:-2]).replace(b',"usage":null', b"") + DONE

# What a client may have put into its request that does not ask for usage.
NOT_ASKED: dict[str, bytes] = {
    "absent": b'{"model":"gpt-5.4","stream":true,"messages":[]}',
    "absent, and a last line": b'{"model":"gpt-5.4","stream":true,"messages":[] \r\n\t }\r\n',
    "absent, pretty": b'{\n  "model": "gpt-5.4",\n  "stream": true,\n  "messages": [\n  ]\n}\n',
    "null": b'{"model":"gpt-5.4","stream_options" : null ,"stream":true,"messages":[]}',
    "empty": b'{"model":"gpt-5.4","stream_options":{},"stream":true,"messages":[]}',
    "empty, spaced": b'{"model":"gpt-5.4","stream_options":{ \n },"stream":true,"messages":[]}',
    "false": b'{"model":"gpt-5.4","stream_options":{"include_usage": false },"stream":true,"messages":[]}',
    "null inside": b'{"model":"gpt-5.4","stream_options":{"include_usage":null},"stream":true,"messages":[]}',
    "another option": b'{"model":"gpt-5.4","stream_options":{ "include_obfuscation":false},"stream":true,"messages":[]}',
    "false, and another": b'{"stream_options":{"x":[1e400],"include_usage":false,"y":{}},"stream":true,"messages":[]}',
    "nested elsewhere": b'{"metadata":{"stream_options":{"include_usage":true}},"stream":true,"messages":[]}',
    "in a string": b'{"messages":[{"content":"\\"stream_options\\":{\\"include_usage\\":true}"}],"stream":true}',
    "odd around it": b'{ "x":[1e400,-0,"\\ud800"],"x":1,\n"stream":true ,"messages":[]}',
}

# What adds characters only; the others have a value replaced.
INSERTED = ["absent", "absent, and a last line", "absent, pretty", "empty", "empty, spaced", "another option"]


async def play(scene: Scene, request: bytes, reply: Reply | None = None, route: str = CHAT) -> Answer:
    scene.reply(reply or STREAM.reply())
    answer = await scene.post(route, request)
    assert (answer.head.status, answer.complete) == (200, True)
    return answer


@pytest.mark.parametrize("what", NOT_ASKED)
async def test_usage_is_asked_for_and_taken_out(what: str, scene: Scene) -> None:
    request = NOT_ASKED[what]
    answer = await play(scene, request)
    assert answer.body == WITHOUT_USAGE
    sent = json.loads(scene.requests[0].body)
    before = json.loads(request)
    options = {**(before.get("stream_options") or {}), "include_usage": True}
    assert sent == {**before, "stream_options": options}
    assert scene.ledger().token_usage["output_tokens"] == 10
    assert scene.ledger().token_usage["completeness"] == "complete"


@pytest.mark.parametrize("what", INSERTED)
async def test_the_option_is_spliced_in(what: str, scene: Scene) -> None:
    """Not a byte of the client's is lost for it: not its spacing, not its last line."""
    await play(scene, NOT_ASKED[what])
    check_splice(NOT_ASKED[what], scene.requests[0].body)


@pytest.mark.parametrize("what", ["false", "null", "null inside", "false, and another", "odd around it"])
async def test_the_rest_of_the_request_is_untouched(what: str, scene: Scene) -> None:
    """Where a value is replaced: what stands before and behind it stays."""
    request = NOT_ASKED[what]
    await play(scene, request)
    sent = scene.requests[0].body
    same = 0
    while request[same] == sent[same]:
        same += 1
    rest = 0
    while request[-1 - rest] == sent[-1 - rest]:
        rest += 1
    replaced = request[same : len(request) - rest]
    assert len(replaced) <= len(b"false"), replaced


@pytest.mark.parametrize("split", [whole, bytewise, lambda body: at_random(body, seed=13)], ids=["whole", "bytes", "random"])
@pytest.mark.parametrize("crlf", [False, True], ids=["LF", "CRLF"])
async def test_it_does_not_matter_how_the_stream_is_split(
    split: Callable[[bytes], list[bytes]], crlf: bool, scene: Scene
) -> None:
    def lines(body: bytes) -> bytes:
        return body.replace(b"\n", b"\r\n") if crlf else body

    answer = await play(scene, NOT_ASKED["absent"], Reply.stream(split(lines(STREAM.response))))
    assert answer.body == lines(WITHOUT_USAGE)


@pytest.mark.parametrize("event", [-3, -2, -1], ids=["ahead of the usage", "of the usage", "behind it"])
async def test_a_line_end_in_two_pieces(event: int, scene: Scene) -> None:
    """The CR in one read and the LF in the next: neither is lost with the chunk that is taken out, nor left behind."""
    pieces = [piece.replace(b"\n", b"\r\n") for piece in events(STREAM.response)]
    stream = b"".join(pieces)
    at = len(b"".join(pieces[: len(pieces) + event + 1])) - 1
    gate = Gate()
    scene.reply(Reply.stream([stream[:at], Wait(gate), stream[at:]]))
    async with scene.client() as client:
        await client.send("POST", CHAT, scene.lines(), NOT_ASKED["absent"])
        await client.head()
        first = pieces[0].replace(b',"usage":null', b"")
        assert await client.exactly(len(first)) == first
        await scene.noticed()
        gate.set()
        assert first + (await client.rest())[0] == WITHOUT_USAGE.replace(b"\n", b"\r\n")


async def test_who_asks_gets_it(scene: Scene) -> None:
    """Identical bytes, both ways."""
    answer = await play(scene, STREAM.request)
    assert answer.body == STREAM.response
    assert scene.requests[0].body == STREAM.request


NOT_STREAMED = [
    b'{"model":"gpt-5.4","messages":[]}',
    b'{"model":"gpt-5.4","messages":[],"stream":false}',
    b'{"model":"gpt-5.4","messages":[],"stream":null}',
    b'{"model":"gpt-5.4","messages":[],"stream":"true"}',
    b'{"model":"gpt-5.4","messages":[{"role":"user","content":"\\"stream\\":true"}]}',
]


@pytest.mark.parametrize("request_body", NOT_STREAMED)
async def test_it_is_only_set_for_streams(request_body: bytes, scene: Scene) -> None:
    """A provider refuses the option without ``stream``."""
    recording = named("chat-text-blocking")
    answer = await play(scene, request_body, recording.reply())
    assert scene.requests[0].body == request_body
    assert answer.body == recording.response
    assert scene.ledger().token_usage["output_tokens"] == 46


@pytest.mark.parametrize("name", ["messages-text-stream", "responses-text-stream"])
async def test_the_other_protocols_do_not_have_it(name: str, scene: Scene) -> None:
    recording = named(name)
    route = "/anthropic/v1/messages" if recording.format == "messages" else "/openai/v1/responses"
    answer = await play(scene, recording.request, recording.reply(), route)
    assert scene.requests[0].body == recording.request
    assert answer.body == recording.response


async def test_a_provider_may_be_left_alone(scene: Scene) -> None:
    """``ask_for_usage = false``, for a server that refuses the option."""
    recording = named("chat-usage-not-asked-stream")
    answer = await play(scene, recording.request, recording.reply(), "/unasked-openai/v1/chat/completions")
    assert scene.requests[0].body == recording.request
    assert answer.body == recording.response
    assert scene.ledger().token_usage["completeness"] == "unknown"


@pytest.mark.parametrize("name", ["chat-usage-on-finish-stream", "chat-openrouter-stream"])
async def test_usage_beside_choices_stays(name: str, scene: Scene) -> None:
    """Some servers send it there, asked or not; a chunk with an answer in it is the client's."""
    recording = named(name)
    answer = await play(scene, NOT_ASKED["absent"], recording.reply())
    assert answer.body == recording.response
    assert scene.ledger().token_usage["output_tokens"] == recording.expect.usage[0]["output_tokens"]


async def test_empty_choices_without_usage_stay(scene: Scene) -> None:
    """Azure's filter results at the start of a stream, a trailing moderation chunk: not ours to take out."""
    opening = b'data: {"choices":[],"id":"","prompt_filter_results":[{"x":1}]}\n\n'
    trailing = b'data: {"choices":[],"id":"chatcmpl-hello","moderation":{"flagged":false}}\n\n'
    stream = opening + STREAM.response[: -len(DONE)] + trailing + DONE
    answer = await play(scene, NOT_ASKED["absent"], Reply.stream(stream))
    assert answer.body == opening + WITHOUT_USAGE[: -len(DONE)] + trailing + DONE


async def test_a_server_that_ignores_the_option(scene: Scene) -> None:
    recording = named("chat-usage-not-asked-stream")
    answer = await play(scene, recording.request, recording.reply())
    assert answer.body == recording.response
    assert scene.ledger().token_usage["completeness"] == "unknown"


async def test_a_server_that_ends_without_done(scene: Scene) -> None:
    """What was taken out was the last thing: the end of the body is the end all the same."""
    answer = await play(scene, NOT_ASKED["absent"], Reply.stream(STREAM.response[: -len(DONE)]))
    assert answer.body == WITHOUT_USAGE[: -len(DONE)]
    assert scene.ledger().token_usage["completeness"] == "complete"


async def test_a_declared_length_is_not_kept(scene: Scene) -> None:
    """The body gets shorter than the provider said."""
    reply = STREAM.reply()
    answer = await play(scene, NOT_ASKED["absent"], Reply(200, reply.headers, reply.body, "length"))
    assert answer.head.get("content-length") is None
    assert answer.body == WITHOUT_USAGE


async def test_a_stream_that_breaks_off(scene: Scene) -> None:
    """Inside an event, whose first half the client has not seen: the error stands on its own."""
    recording = named("chat-cut-inside-an-event")
    scene.reply(recording.reply())
    answer = await scene.post(CHAT, NOT_ASKED["absent"])
    first = events(recording.response.rpartition(b"\n\n")[0] + b"\n\n")
    assert answer.body.startswith(b"".join(first))
    (error,) = events(answer.body[len(b"".join(first)) :])
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"]
    assert scene.ledger().interception["status"] == "failed"


async def test_the_sdk_is_not_surprised(scene: Scene) -> None:
    """OpenAI's own helper reads ``choices[0]`` of nothing, as clients do that did not ask."""
    scene.reply(STREAM.reply())
    async with openai_client(scene) as client:
        stream = await client.chat.completions.create(
            model="gpt-5.4", messages=[{"role": "user", "content": "Say hello"}], stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == STREAM.expect.text
    assert scene.ledger().token_usage["output_tokens"] == 10
