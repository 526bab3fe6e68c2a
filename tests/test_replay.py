"""``aibridge replay``: what a gateway has dumped, sent again.

Truth: issue 5 ("sends one again against any base URL"): what the provider receives the second time is what it received the
first time, the credential aside. Exit statuses and what is printed are our choice.
"""

import asyncio
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies as st

from aibridge.cli import main
from aibridge.dumpfiles import Unusable, read_request
from aibridge.dumps import TrafficDumps
from aibridge.providers import Provider
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest
from aibridge.wire.observer import ResponseHead
from tests.support.dumps import dumped, dumps_in, finished
from tests.support.gateway import Gateway, wait_until
from tests.support.provider import CUT, STALL, Received, Reply, ThreadedProvider, at_random
from tests.support.rawclient import Answer, RawClient

CLIENT_KEY = "sk-ant-client-2b5c8d1e4f"
CONFIGURED_KEY = "sk-ant-configured-77a0c3"
OTHER_KEY = "sk-other-0f9e8d7c6b"

_TOML = """
[dumps]
directory = "{folder}"
max_dump_bytes = 200000

[providers.anthropic]
base_url = "{url}"
dump = true

[providers.keyed]
kind = "openai"
base_url = "{url}/sub/v1"
api_key = "{key}"
dump = true

[providers.quiet]
kind = "anthropic"
base_url = "{url}"
"""


@dataclass(frozen=True, slots=True)
class Site:
    """A gateway that dumps, between a client and a scripted provider. `config` is the gateway's."""

    gateway: Gateway
    provider: ThreadedProvider
    folder: Path
    config: Path
    earlier: int = 0
    """How many requests other tests have sent."""

    @property
    def requests(self) -> list[Received]:
        return self.provider.requests[self.earlier :]


@contextmanager
def dumping(folder: Path, **environment: str) -> Iterator[Site]:
    with ThreadedProvider() as provider:
        toml = _TOML.format(folder=folder / "dumps", url=provider.url, key=CONFIGURED_KEY)
        config = folder / "replay.toml"
        config.write_text(toml)
        with Gateway(toml=toml, env=environment) as gateway:
            yield Site(gateway, provider, folder / "dumps", config)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with dumping(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    """The shared site without dumps of earlier tests."""
    yield replace(shared, earlier=len(shared.provider.requests))
    shared.provider.handle(None)
    for path in shared.folder.iterdir():
        path.unlink()


async def post(site: Site, target: str, body: bytes, *headers: tuple[str, str], method: str = "POST") -> Answer:
    async with RawClient(site.gateway.url) as client:
        lines = [("Content-Type", "application/json"), ("X-Api-Key", CLIENT_KEY), *headers]
        return await client.request(method, target, lines, body if method == "POST" else None)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of the command. No secret is in what it says of itself."""

    status: int
    output: bytes
    said: str

    def __post_init__(self) -> None:
        assert not any(secret in self.said for secret in (CLIENT_KEY, CONFIGURED_KEY, OTHER_KEY))
        assert "Traceback" not in self.said


def invoke(*arguments: object, env: Mapping[str, str] | None = None) -> Replayed:
    """The command, in this process."""
    result = CliRunner().invoke(main, ["replay", *map(str, arguments)], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Replayed(result.exit_code, result.stdout_bytes, result.stderr)


async def replay(*arguments: object, env: Mapping[str, str] | None = None) -> Replayed:
    """The command, beside an event loop."""
    return await asyncio.to_thread(invoke, *arguments, env=env)


def replay_as_process(*arguments: object, env: Mapping[str, str]) -> Replayed:
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent", **env}
    command = [sys.executable, "-m", "aibridge", "replay", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=environment)
    return Replayed(done.returncode, done.stdout, done.stderr.decode())


def lines_of(received: Received, *, without: str) -> list[tuple[bytes, bytes]]:
    return [field for field in received.headers if field[0].lower() != without.encode()]


MESSAGE = {"model": "claude-x", "max_tokens": 10, "messages": [{"role": "user", "content": "héllo  ✓"}]}
BODY = json.dumps(MESSAGE, ensure_ascii=False, indent=1).encode() + b"\n"
ANSWER = b'{"id":"msg_1","type":"message","role":"assistant","content":[],"usage":{"input_tokens":1,"output_tokens":2}}'


async def test_a_request_is_sent_again_as_it_was(site: Site) -> None:
    site.provider.replies(Reply.json(ANSWER), Reply.json(ANSWER, headers=[("X-Twice", "1"), ("X-Twice", "2")]))
    first = await post(site, "/anthropic/v1/messages?beta=true", BODY, ("X-Odd", "a  b"), ("Anthropic-Beta", "x-1"))
    assert first.head.status == 200
    (dump,) = finished(site.folder, 1)
    assert dump.request.body == BODY and dump.response is not None and dump.response.body == ANSWER
    done = replay_as_process(dump.path, "--config", site.config, "--key-env", "KEY", env={"KEY": OTHER_KEY})
    assert done.status == 0, done.said
    one, two = site.requests
    assert (two.method, two.target, two.body) == (one.method, one.target, one.body)
    assert [name for name, _ in two.headers] == [name for name, _ in one.headers]
    assert lines_of(two, without="x-api-key") == lines_of(one, without="x-api-key")
    assert one.header("x-api-key") == [CLIENT_KEY] and two.header("x-api-key") == [OTHER_KEY]
    head, _, body = done.output.partition(b"\n\n")
    assert body == ANSWER
    assert head.splitlines()[0] == b"HTTP/1.1 200" and b"x-twice: 1\nx-twice: 2" in head
    said = done.said
    assert f"POST {site.provider.url}/v1/messages?beta=true" in said and "KEY" in said


async def test_the_dump_is_found_by_the_id_in_the_ledger(site: Site) -> None:
    site.provider.replies(Reply.json(ANSWER))
    await post(site, "/anthropic/v1/messages", BODY, ("X-Session-Id", "s-1"))
    interception = site.gateway.ledger("s-1").interception
    (dump,) = finished(site.folder, 1)
    assert dump.path.name.endswith(f"Z-anthropic-{interception['id']}-1-1.warc")


async def test_no_secret_is_in_a_dump_and_only_what_is_wanted_is_dumped(site: Site) -> None:
    quoting = f'{{"error":{{"message":"invalid x-api-key {CLIENT_KEY}"}}}}'.encode()
    coded = [("Content-Encoding", "gzip"), ("Content-Type", "application/json"), ("Set-Cookie", "a=very-secret-cookie")]
    site.provider.handle(lambda _: Reply(401, coded, at_random(gzip.compress(quoting), 3)))
    for target in ("/anthropic/v1/messages", "/anthropic/v1/messages/count_tokens", "/quiet/v1/messages"):
        answer = await post(site, target, BODY, ("Accept-Encoding", "gzip"))
        assert answer.head.status == 401
    keyed = await post(
        site, "/keyed/v1/chat/completions", b'{"model":"m","messages":[]}', ("Authorization", "Bearer " + CLIENT_KEY)
    )
    assert keyed.head.status == 401
    found = finished(site.folder, 3)
    for dump in found:
        data = dump.path.read_bytes()
        for secret in (CLIENT_KEY, CONFIGURED_KEY, "very-secret-cookie"):
            assert secret.encode() not in data
    assert found[0].response is not None and found[0].response.body == quoting.replace(
        CLIENT_KEY.encode(), b"*" * len(CLIENT_KEY)
    )
    assert [dump.request.record["Aibridge-Provider"] for dump in found] == ["anthropic", "anthropic", "keyed"]
    assert "dumped to" in site.gateway.output and "in clear" in site.gateway.output


async def test_a_configured_key_goes_to_its_provider(site: Site) -> None:
    site.provider.handle(lambda _: Reply.json(b"{}"))
    body = b'{"model":"m","messages":[]}'
    await post(site, "/keyed/v1/chat/completions", body)
    (dump,) = finished(site.folder, 1)
    done = await replay(dump.path, "--config", site.config)
    assert done.status == 0 and "the api_key of provider keyed" in done.said
    one, two = site.requests
    assert two.headers == one.headers and two.target == one.target == "/sub/v1/chat/completions" and two.body == one.body
    assert two.header("authorization") == [f"Bearer {CONFIGURED_KEY}"]


async def test_a_configured_key_goes_nowhere_else_unless_told_to(site: Site) -> None:
    site.provider.handle(lambda _: Reply.json(b"{}"))
    await post(site, "/keyed/v1/chat/completions", b'{"model":"m","messages":[]}')
    (dump,) = finished(site.folder, 1)
    with ThreadedProvider(lambda _: Reply.json(b"{}")) as other:
        to_other = [dump.path, "--config", site.config, "--base-url", other.url + "/else/"]
        for arguments, sent in (
            ([], []),
            (["--send-api-key"], [f"Bearer {CONFIGURED_KEY}"]),
            (["--key-env", "KEY"], [f"Bearer {OTHER_KEY}"]),
        ):
            done = await replay(*to_other, *arguments, env={"KEY": OTHER_KEY})
            assert done.status == 0, done.said
            assert other.requests[-1].header("authorization") == sent
            assert other.requests[-1].target == "/else/chat/completions"
            assert ("credential: none: this is not the server" in done.said) == (not sent)


async def test_another_gateway_needs_no_configuration(site: Site, tmp_path: Path) -> None:
    """Such as one under test, from a dump that somebody has sent along."""
    site.provider.handle(lambda _: Reply.json(ANSWER))
    await post(site, "/anthropic/v1/messages", BODY)
    (dump,) = finished(site.folder, 1)
    copy = shutil.copy(dump.path, tmp_path / "sent-along.warc")
    done = await replay(copy, "--base-url", f"{site.gateway.url}/quiet", "--key-env", "KEY", env={"KEY": OTHER_KEY})
    assert done.status == 0 and done.output.endswith(ANSWER)
    assert site.requests[1].body == BODY and site.requests[1].header("x-api-key") == [OTHER_KEY]


async def test_other_methods_and_chunked_bodies(site: Site) -> None:
    site.provider.handle(lambda _: Reply.json(b"{}"))
    await post(site, "/anthropic/v1/models?limit=1", b"", method="GET")
    async with RawClient(site.gateway.url) as client:
        lines = [("Transfer-Encoding", "chunked"), ("Content-Type", "application/json"), ("X-Api-Key", CLIENT_KEY)]
        await client.send("POST", "/anthropic/v1/messages/count_tokens", lines)
        await client.write(b"3\r\n{  \r\n1\r\n}\r\n0\r\n\r\n")
        await client.answer()
    for dump in finished(site.folder, 2):
        assert (await replay(dump.path, "--config", site.config, "--key-env", "KEY", env={"KEY": CLIENT_KEY})).status == 0
    one, two, again, two_again = site.requests
    for first, second in ((one, again), (two, two_again)):
        assert (second.method, second.target, second.headers, second.body) == (
            first.method,
            first.target,
            first.headers,
            first.body,
        )
    assert two.body == b"{  }" and two.header("transfer-encoding") == ["chunked"]


async def test_the_response_is_printed_as_it_comes(site: Site) -> None:
    site.provider.reply(Reply.json(ANSWER))
    await post(site, "/anthropic/v1/messages", BODY)
    (dump,) = finished(site.folder, 1)
    events = b"event: ping\ndata: {}\n\n" * 50
    coded = [("Content-Encoding", "gzip"), ("Content-Type", "text/event-stream")]
    site.provider.replies(
        Reply(200, coded, at_random(gzip.compress(events), 1)),
        Reply.json(b'{"error":{}}', status=529),
        Reply.stream([b"data: 1\n\n", CUT]),
        Reply(200, [("Content-Encoding", "gzip")], [b"no gzip at all"]),
    )
    arguments = [dump.path, "--config", site.config]
    decoded = await replay(*arguments)
    assert (decoded.status, decoded.output.partition(b"\n\n")[2]) == (0, events)
    overloaded = await replay(*arguments)
    assert (
        overloaded.status == 1 and overloaded.output.endswith(b'\n\n{"error":{}}') and b"HTTP/1.1 529" in overloaded.output
    )
    broken = await replay(*arguments)
    assert broken.status == 3 and broken.output.endswith(b"\n\ndata: 1\n\n") and "broke off" in broken.said
    garbled = await replay(*arguments)
    assert garbled.status == 3 and "cannot be decoded" in garbled.said
    nobody = await replay(dump.path, "--base-url", "http://127.0.0.1:9")
    assert nobody.status == 3 and "could not be reached" in nobody.said and nobody.output == b""


async def test_a_request_that_was_cut_is_refused(site: Site) -> None:
    site.provider.reply(Reply.json(ANSWER))
    await post(site, "/anthropic/v1/messages", json.dumps(MESSAGE | {"metadata": "x" * 300_000}).encode())
    (dump,) = finished(site.folder, 1)
    assert dump.request.truncated == "length"
    done = await replay(dump.path, "--config", site.config)
    assert done.status == 2 and "cut" in done.said and "max_dump_bytes" in done.said
    assert done.said.count("cannot be sent again") == 1
    assert len(site.requests) == 1


async def test_a_call_that_still_hangs_can_be_sent_again(site: Site) -> None:
    """What is written of it by then is whole."""
    site.provider.replies(Reply(before=[STALL]), Reply.json(ANSWER))
    async with RawClient(site.gateway.url) as client:
        await client.send("POST", "/anthropic/v1/messages", [("Content-Type", "application/json")], BODY)
        site.provider.exchange(site.earlier)

        def written() -> bool:
            return any(b"\r\nContent-Length: " in path.read_bytes() for path in site.folder.glob("*.warc"))

        wait_until(written, "no dump of the request")
        (path,) = site.folder.glob("*.warc")
        done = await replay(path, "--config", site.config)
    assert done.status == 0 and done.output.endswith(ANSWER)
    assert site.requests[1].body == BODY


STREAM = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","usage":{"input_tokens":3}}}\n\n',
    b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":5}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
)
STREAMING = json.dumps(MESSAGE | {"stream": True}).encode()


async def test_a_stream_is_dumped_to_its_end(site: Site) -> None:
    site.provider.reply(Reply.stream(STREAM))
    answer = await post(site, "/anthropic/v1/messages", STREAMING)
    assert answer.complete
    (dump,) = finished(site.folder, 1)
    assert dump.facts["outcome"] == "complete" and dump.facts["response-bytes"] == str(len(b"".join(STREAM)))
    assert dump.response is not None and dump.response.body == b"".join(STREAM) and dump.response.truncated is None


async def test_a_client_that_leaves_is_seen_in_the_dump(site: Site) -> None:
    site.provider.reply(Reply.stream([STREAM[0], STALL]))
    async with RawClient(site.gateway.url) as client:
        await client.send("POST", "/anthropic/v1/messages", [("Content-Type", "application/json")], STREAMING)
        await client.head()
        await client.until()
    (dump,) = finished(site.folder, 1)
    assert dump.facts["outcome"] == "let go"
    assert dump.response is not None and dump.response.body == STREAM[0] and dump.response.truncated == "unspecified"


async def test_a_gateway_that_stops_finishes_its_dumps(tmp_path: Path) -> None:
    """Two workers, so two processes that write to one directory."""
    with dumping(tmp_path, AIBRIDGE_SERVER__WORKERS="2", AIBRIDGE_SERVER__SHUTDOWN_GRACE="0") as site:
        site.provider.handle(lambda _: Reply.stream([STREAM[0], STALL]))
        async with AsyncExitStack() as clients:
            for _ in range(6):
                client = await clients.enter_async_context(RawClient(site.gateway.url))
                await client.send("POST", "/anthropic/v1/messages", [("Content-Type", "application/json")], STREAMING)
                await client.head()
                await client.until()
            await asyncio.to_thread(site.gateway.stop)
        found = [dumped(path) for path in dumps_in(site.folder)]
    assert [dump.facts["outcome"] for dump in found] == ["let go"] * 6
    assert all(dump.response is not None and dump.response.body == STREAM[0] for dump in found)


# ---- what is no dump, or cannot be sent ----


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """One without a gateway, to be changed by tests."""

    async def call() -> None:
        async with TrafficDumps(tmp_path / "dumps") as dumps:
            provider = Provider("mine", "anthropic", "http://127.0.0.1:9/base", dump=True)
            upstream = dumps.upstream(provider, MemoryUpstream(lambda _: MemoryResponse(ResponseHead(200, []))))
            url = "http://127.0.0.1:9/base/v1/messages?api-key=" + CLIENT_KEY
            headers = [(b"x-other", b"a " + CLIENT_KEY.encode()), (b"cf-access-client-secret", b"12345678")]
            response = await upstream.send(UpstreamRequest("POST", url, headers, b'{"a":"' + CLIENT_KEY.encode() + b'"}'))
            response.close()

    asyncio.run(call())
    (path,) = (tmp_path / "dumps").iterdir()
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and an environment without settings."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name in list(os.environ):
        if name.upper().startswith(("AIBRIDGE_", "ANTHROPIC_", "OPENAI_")) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "not a traffic dump"),
        (lambda data: b"hello\n" * 1000, "not a traffic dump"),
        (lambda data: data.replace(b"WARC-Type: request", b"WARC-Type: warcinfo"), "not a traffic dump"),
        (lambda data: data.replace(b"Aibridge-Base-URL", b"X-Base-URL"), "not a traffic dump"),
        (lambda data: data.replace(b"Content-Length: ", b"                ", 1), "never written to the end"),
        (lambda data: data[: data.index(b'{"a"') + 3], "ends inside"),
        (lambda data: data[: data.index(b"POST") + 3], "ends inside"),
        (lambda data: data.replace(b"Content-Length: ", b"Content-Length: 99999999", 1), "ends inside"),
        (lambda data: data.replace(b"HTTP/1.1", b"GARBAGE!"), "does not hold an HTTP request"),
    ],
    ids=["empty", "text", "other-warc", "foreign", "under-way", "cut", "cut-head", "too-long", "no-http"],
)
def test_what_is_no_whole_dump(dump: Path, damage: object, said: str) -> None:
    assert callable(damage)
    dump.write_bytes(damage(dump.read_bytes()))
    result = invoke(dump, "--base-url", "http://127.0.0.1:9")
    assert result.status == 2 and said in result.said


@given(st.binary(max_size=60), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_in_a_file_is_read_or_refused(dump: Path, garbage: bytes, start: float, end: float) -> None:
    data = dump.read_bytes()
    damaged = dump.with_name("damaged.warc")
    damaged.write_bytes(data[: int(start * len(data))] + garbage + data[int(end * len(data)) :])
    with suppress(Unusable):
        assert read_request(damaged).method.isalpha()


def test_there_is_no_such_file() -> None:
    assert invoke("nothing.warc").status == 2


def test_a_provider_that_is_not_configured(dump: Path) -> None:
    result = invoke(dump)
    assert result.status == 2 and "no provider 'mine'" in result.said and "--base-url" in result.said


@pytest.mark.parametrize("url", ["127.0.0.1:9", "ftp://h", "http://user:secret@h"])
def test_a_base_url_that_is_none(dump: Path, url: str) -> None:
    result = invoke(dump, "--base-url", url)
    assert result.status == 2 and "base-url" in result.said and "secret" not in result.said


def test_a_variable_that_is_not_set(dump: Path) -> None:
    result = invoke(dump, "--base-url", "http://127.0.0.1:9", "--key-env", "NOTHING")
    assert result.status == 2 and "NOTHING is not set" in result.said


def test_what_goes_out_masked_is_said(dump: Path) -> None:
    with ThreadedProvider(lambda _: Reply.json(b"{}")) as provider:
        result = invoke(dump, "--base-url", provider.url, "--key-env", "KEY", env={"KEY": OTHER_KEY})
        (received,) = provider.requests
    hidden = "*" * len(CLIENT_KEY)
    assert received.target == f"/v1/messages?api-key={hidden}"
    assert received.body == f'{{"a":"{hidden}"}}'.encode()
    assert received.header("x-other") == [f"a {hidden}"] and not received.header("cf-access-client-secret")
    assert received.header("x-api-key") == [OTHER_KEY], "where the provider's kind looks for it"
    notes = [line for line in result.said.splitlines() if line.startswith("note: ")]
    assert len(notes) == 5 and notes[0] == "note: it was sent to http://127.0.0.1:9/base"
    assert "?api-key" in notes[1] and "x-other" in notes[2]
    assert "cf-access-client-secret held a credential, and is left out" in notes[3] and "body" in notes[4]
