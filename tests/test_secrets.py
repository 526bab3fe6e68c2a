"""Marked secrets go through a gateway that logs, counts, traces, dumps and records all it can, and none of them stays.

Truth: issue 5, point 4 ("a capture of logs, metrics, traces, dumps and database after a run with marked secrets ... contains
none of them"). Each secret is seen where it has to go, so that its absence elsewhere says something.
"""

import asyncio
import base64
import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest

from tests.support.dumps import Dumped, finished
from tests.support.gateway import Rows, Scene, Stage, staged, wait_until
from tests.support.injected_dialects import MESSAGES
from tests.support.injected_servers import calls, play_in
from tests.support.mcp_servers import SECRET as MCP_SECRET, Process, command, server
from tests.support.otlp import Receiver
from tests.support.provider import CUT, Received, Reply

PROVIDER_KEY: Final = "sk-ant-central-6fd1c09e77b2"
GATEWAY_KEY: Final = "gateway-key-of-alice-38a4e1"
"""What the client shows us, and the provider must not see: a key is configured."""
OAUTH_TOKEN: Final = "sk-ant-oat01-of-bob-90c2f7aa"
TRACES_KEY: Final = "receiver-key-51b7d3"
COOKIE: Final = "cookie-of-carol-2c71ee"
PARAMETER: Final = "token-of-dave-7be1f0"
"""In a query, as some servers want it, and in a field that is no usual one."""
SERVER_TOKEN: Final = "token-of-erin-e04/b8"
"""In a body, for a server that the provider calls."""
SECRETS: Final = (PROVIDER_KEY, GATEWAY_KEY, OAUTH_TOKEN, MCP_SECRET, TRACES_KEY, COOKIE, PARAMETER, SERVER_TOKEN)

STREAM: Final = MESSAGES.request(stream=True, model="m")
BLOCKING: Final = MESSAGES.request(stream=False, model="m")

CONFIGURATION: Final = f"""
[log]
level = "debug"

[dumps]
directory = "dumps"

[tracing]
endpoint = "{{traces}}"
headers = {{{{ X-Receiver-Key = "{TRACES_KEY}" }}}}
content = true

[providers.anthropic]
base_url = "{{provider}}"
api_key = "{PROVIDER_KEY}"
dump = true

[providers.own]
kind = "anthropic"
base_url = "{{provider}}"
dump = true

[providers.gone]
kind = "anthropic"
base_url = "{{refused}}"
api_key = {{{{ env = "THE_PROVIDER_KEY" }}}}
dump = true
retries = {{{{ attempts = 1 }}}}
breaker = {{{{ enabled = true, threshold = 1 }}}}

[mcp.servers.remote]
url = "{{remote}}"
headers = {{{{ X-API-Key = "{MCP_SECRET}" }}}}

[mcp.servers.local]
command = {{command}}
env.TOKEN = "{MCP_SECRET}"
env.PYTHONPATH = {{modules}}
start_timeout = 30
"""


@contextmanager
def guarded(receiver: Receiver) -> Iterator[tuple[Stage, Process]]:
    """A stage whose MCP server wants a secret in all places where one can be."""
    with server("sdk", "http", "guarded") as process:
        remote = process.url.replace("http://", f"http://me:{MCP_SECRET}@") + f"?key={MCP_SECRET}"
        toml = CONFIGURATION.format(
            traces=receiver.url,
            provider="{provider}",
            refused="{refused}",
            remote=remote,
            command=json.dumps(command("sdk")),
            modules=json.dumps(str(Path(__file__).parents[1])),
        )
        with staged(toml, env={"THE_PROVIDER_KEY": PROVIDER_KEY, "AIBRIDGE_LOG__FORMAT": "json"}) as stage:
            yield stage, process


def shown(received: Received) -> bytes:
    """All that a provider got."""
    return b"\n".join((received.target.encode(), *(part for field in received.headers for part in field), received.body))


async def answered(scene: Scene, provider: str, body: bytes, reply: Reply, *headers: tuple[str, str]) -> bytes:
    """What the provider got for a request that is answered so."""
    scene.reply(reply)
    before = len(scene.requests)
    await scene.post(f"/{provider}/v1/messages", body, headers)
    return shown(scene.requests[before])


async def all_goes_well(scene: Scene) -> None:
    """A conversation of two turns with tools of both servers, one of which tells what it knows."""
    add, environment = calls("remote", "add", a=1, b=2), calls("local", "environment")
    played = await play_in(scene, MESSAGES, [(add, environment)])
    assert played.succeeded(add, "3")
    assert "TOKEN" in json.dumps(played.results[environment.id])


async def the_provider_quotes_credentials(scene: Scene) -> None:
    """In an error, in a coded one, in an error in mid-stream, in a header field, and where it breaks off."""
    said = json.dumps(
        {"type": "error", "error": {"type": "authentication_error", "message": f"no such key: {PROVIDER_KEY}"}}
    )
    own = ("x-api-key", GATEWAY_KEY), ("Cookie", f"session={COOKIE}")
    got = await answered(scene, "anthropic", BLOCKING, Reply.json(json.loads(said), 401), *own)
    assert PROVIDER_KEY.encode() in got and GATEWAY_KEY.encode() not in got and COOKIE.encode() not in got
    coded = Reply(401, [("content-type", "application/json"), ("content-encoding", "gzip")], [gzip.compress(said.encode())])
    await answered(scene, "anthropic", BLOCKING, coded, *own)
    event = f"event: error\ndata: {said}\n\n".encode()
    await answered(scene, "anthropic", STREAM, Reply.stream([event[:80], event[80:]]), *own)
    half = f'event: message_start\ndata: {{"odd": "{OAUTH_TOKEN}'.encode()
    cookies = Reply(200, [("content-type", "text/event-stream"), ("set-cookie", f"a={COOKIE}")], [half, CUT])
    got = await answered(scene, "own", STREAM, cookies, ("Authorization", f"Bearer {OAUTH_TOKEN}"))
    assert OAUTH_TOKEN.encode() in got
    message = f"nothing at /v1/messages?token={PARAMETER} for {PARAMETER}"
    scene.reply(Reply.json({"type": "error", "error": {"type": "not_found_error", "message": message}}, 404))
    await scene.post(f"/own/v1/messages?token={PARAMETER}", BLOCKING, [("X-Goog-API-Key", PARAMETER)])
    assert shown(scene.requests[-1]).count(PARAMETER.encode()) == 2


async def the_provider_quotes_what_the_body_holds(scene: Scene) -> None:
    """On an intercepted route, and on one that only passes through."""
    server = {"type": "url", "name": "s", "url": "https://mcp.test", "authorization_token": SERVER_TOKEN}
    body = json.dumps({**json.loads(BLOCKING), "mcp_servers": [server]}).encode()
    message = f"no access with {json.dumps(SERVER_TOKEN)} nor with {quote(SERVER_TOKEN, safe='')}"
    reply = Reply.json({"type": "error", "error": {"type": "invalid_request_error", "message": message}}, 400)
    for path in ("/own/v1/messages", "/own/v1/messages/count_tokens"):
        scene.reply(reply)
        answer = await scene.post(path, body)
        assert answer.head.status == 400
        assert SERVER_TOKEN.encode() in shown(scene.requests[-1])


async def requests_are_refused(scene: Scene) -> None:
    """What is no JSON, and what goes to a provider that is not there: tried again, and then kept away from it."""
    token = ("Authorization", f"Bearer {OAUTH_TOKEN}")
    assert (await scene.post("/own/v1/messages", f'{{"{OAUTH_TOKEN}'.encode(), [token])).head.status == 400
    assert (await scene.post("/own/v1/nowhere", BLOCKING, [token])).head.status == 404
    statuses = [(await scene.post("/gone/v1/messages", BLOCKING, [token])).head.status for _ in range(2)]
    assert statuses == [502, 503]
    async with scene.client() as client:
        scene.reply(Reply.json({"data": []}))
        listed = await client.request("GET", f"/own/v1/models?key={quote(OAUTH_TOKEN)}", scene.lines(token))
        assert listed.head.status == 200


async def configurations_are_wrong(stage: Stage) -> None:
    """The file is read anew with a secret where none can be; and once more as it was, with a key for a server changed."""
    file = stage.gateway.folder / "aibridge.toml"
    text = file.read_text()
    in_a_url = f'base_url = "http://me:{PROVIDER_KEY}@127.0.0.1"'
    for wrong in (f'api_key = ["{PROVIDER_KEY}"]', in_a_url, f'drain_seconds = "{PROVIDER_KEY}"'):
        file.write_text(f'{text}\n[providers.wrong]\nkind = "anthropic"\n{wrong}\n')
        await reloaded(stage, "the old configuration still holds")
    file.write_text(text.replace("start_timeout = 30", "start_timeout = 31"))
    await reloaded(stage, "the configuration was reloaded")


async def reloaded(stage: Stage, outcome: str) -> None:
    """Have the configuration read anew. `outcome` is what the log says then."""
    gateway = stage.gateway
    before = gateway.output.count(outcome)
    gateway.process.send_signal(signal.SIGHUP)
    await asyncio.to_thread(wait_until, lambda: gateway.output.count(outcome) > before, f"no {outcome!r} in the log")


def checked(stage: Stage) -> bytes:
    """What the commands that look at the configuration print."""
    environment = {"PATH": os.environ["PATH"], "THE_PROVIDER_KEY": PROVIDER_KEY, "HOME": str(stage.gateway.folder)}
    printed = b""
    for words in (["check", "--timeout", "1"], ["mcp", "list", "-v"]):
        line = [sys.executable, "-m", "aibridge", *words]
        done = subprocess.run(line, cwd=stage.gateway.folder, env=environment, capture_output=True, timeout=60, check=False)
        printed += done.stdout + done.stderr
    return printed


def decoded(dumps: list[Dumped]) -> bytes:
    """Bodies of dumps as those see them who take the content coding off."""
    bodies = [dump.response.body for dump in dumps if dump.response is not None]
    return b"".join(gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body for body in bodies)


def forms(secret: str) -> Iterator[bytes]:
    """The ways in which a secret may be written down."""
    raw = secret.encode()
    yield raw
    yield base64.b64encode(raw)
    yield base64.b64encode(f"me:{secret}".encode())
    yield quote(secret, safe="").encode()
    yield raw.hex().encode()
    yield "".join(f"\\u{ord(character):04x}" for character in secret).encode()


async def captured() -> tuple[Mapping[str, bytes], Rows]:
    with Receiver() as receiver, guarded(receiver) as (stage, process):
        with stage.scene(trouble="") as scene:
            await all_goes_well(scene)
            await the_provider_quotes_credentials(scene)
            await the_provider_quotes_what_the_body_holds(scene)
            await requests_are_refused(scene)
            await configurations_are_wrong(stage)
            async with scene.client() as client:
                metrics = (await client.request("GET", "/metrics")).body
                ready = (await client.request("GET", "/readyz")).body
            process.kill()
            rows = await asyncio.to_thread(scene.ended, 9)
        stage.provider.handle(lambda _: Reply.json({"data": []}))
        printed = await asyncio.to_thread(checked, stage)
        assert await asyncio.to_thread(stage.gateway.stop) == -signal.SIGTERM
        dumps = finished(stage.gateway.folder / "dumps", 11)
        places = {
            "logs": stage.gateway.output.encode(),
            "metrics": metrics,
            "readiness": ready,
            "printed": printed,
            "traces": b"".join(export.body for export in receiver.exports),
            "dumps": b"".join(path.read_bytes() for path in sorted((stage.gateway.folder / "dumps").iterdir())),
            "bodies of dumps": decoded(dumps),
            "names of dumps": "\n".join(path.name for path in (stage.gateway.folder / "dumps").iterdir()).encode(),
            "ledger": stage.gateway.dump(),
        }
        assert {export.headers["x-receiver-key"] for export in receiver.exports} == {TRACES_KEY}
        return places, rows


@pytest.fixture(scope="module")
def capture() -> tuple[Mapping[str, bytes], Rows]:
    return asyncio.run(captured())


# What must be there, or there would be no sense in looking for what must not.
CONTROLS: Final[dict[str, Any]] = {
    "logs": rb'"interception_id"',
    "metrics": rb'aibridge_injected_tool_invocations_total{[^}]*server="remote"',
    "readiness": rb'"ready":true',
    "printed": rb"providers.anthropic",
    "traces": rb"execute_tool",
    "dumps": rb"WARC-Type: response",
    "bodies of dumps": rb"no such key: ",
    "names of dumps": rb"\.warc",
    "ledger": rb"no such key: ",
}


@pytest.mark.parametrize("place", CONTROLS)
def test_no_secret_is_kept(capture: tuple[Mapping[str, bytes], Rows], place: str) -> None:
    text = capture[0][place]
    assert re.search(CONTROLS[place], text), text[-3000:]
    found = [text[max(text.find(form) - 100, 0) :][:200] for secret in SECRETS for form in forms(secret) if form in text]
    assert found == []


def test_what_was_done_is_in_the_ledger(capture: tuple[Mapping[str, bytes], Rows]) -> None:
    """With hints that tell keys apart."""
    hints = {row["credential_hint"] for row in capture[1].interceptions}
    assert {f"...{PROVIDER_KEY[-4:]}", f"...{OAUTH_TOKEN[-4:]}"} <= hints


def test_looking_finds_what_there_is(tmp_path: Path) -> None:
    for secret in SECRETS:
        for form in forms(secret):
            assert any(other in b"before " + form + b" after" for other in forms(secret))
