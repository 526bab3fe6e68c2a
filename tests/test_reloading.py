"""The configuration is read anew while the gateway runs.

Truth: issue 5 ("Configuration reload on SIGHUP (providers, keys, MCP, limits) without dropping a stream; an invalid file
keeps the old one and says so"). What else can be changed while it runs, and what is said of the rest, is our choice. Under
load: `tests.test_rolling`.
"""

import asyncio
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from aibridge import MemoryRecorder
from aibridge.config import ConfigurationError, Settings
from aibridge.process import Service
from aibridge.reloading import Configuration, renewed
from aibridge.server import Server
from aibridge.worker import Reload, take_over
from tests.serving import call, scope, settings
from tests.support.crowd import MESSAGES, answer, ask, until
from tests.support.gateway import Gateway, wait_until
from tests.support.injected import Calls, Says, turn
from tests.support.injected_dialects import MESSAGES as DIALECT
from tests.support.injected_servers import SUMS, name_of, reply, toml
from tests.support.provider import Reply, ScriptedProvider, ThreadedProvider
from tests.support.rawclient import RawClient
from tests.test_cli import process
from tests.test_config import SETTINGS

MODELS: Final = "/openai/v1/models"
OFF_LOOPBACK: Final = {"host": "0.0.0.0"}
BEHIND_A_PROXY: Final = {"header": "X-User", "trusted_proxies": ["10.0.0.0/8"]}


# ---- what can be taken over ----


def test_what_can_be_changed_and_what_needs_a_restart() -> None:
    old = settings(server={"port": 1000})
    new = settings(
        server={
            "port": 2000,
            "workers": 3,
            "shutdown_grace": 7,
            "drain_delay": 3,
            "worker_timeout": 9,
            "allowed_hosts": ["h"],
        },
        database={"url": "sqlite:///other.db"},
        upstream={"idle_timeout": 1},
        identity={"header": "X-User"},
        limits={"max_body_bytes": 5},
        providers={"vllm": {"kind": "openai", "base_url": "http://gpu/v1"}},
        mcp={"max_turns": 3, "servers": {"time": {"command": ["time"]}}},
    )
    found, fixed = renewed(old, new)
    assert fixed == ["database.url", "server.port", "server.workers", "upstream.idle_timeout"]
    assert (found.identity, found.limits, found.providers, found.mcp) == (new.identity, new.limits, new.providers, new.mcp)
    assert (found.database, found.upstream) == (old.database, old.upstream)
    assert found.server == new.server.model_copy(update={"port": 1000, "workers": 1})
    assert renewed(found, new)[0] == found


@pytest.mark.parametrize("key", [key for key in SETTINGS if key.count(".") == 1])
def test_each_setting_is_taken_over_or_named(key: str) -> None:
    """One that is new in the tree cannot be forgotten."""
    section, _, name = key.partition(".")
    old = settings()
    new = old.model_copy(update={section: getattr(old, section).model_copy(update={name: SETTINGS[key][2]})})
    found, fixed = renewed(old, new)
    assert all(one == key or one.startswith(f"{key}.") for one in fixed)
    assert found == (old if fixed else new)


def test_a_change_that_does_not_go_with_what_stays() -> None:
    """Each file is fine by itself. But the socket stays where strangers reach it, and nobody would know who they are."""
    strangers_come = settings(server=OFF_LOOPBACK, identity=BEHIND_A_PROXY)
    with pytest.raises(ConfigurationError, match="requests must be authenticated"):
        renewed(strangers_come, settings())


async def test_nothing_is_taken_over_where_the_file_cannot_be_used(caplog: pytest.LogCaptureFixture) -> None:
    old = settings()
    given: list[Settings | Exception] = [ConfigurationError("server.prot: there is no such setting"), settings(), old]

    def load() -> Settings:
        match given.pop(0):
            case Exception() as error:
                raise error
            case Settings() as read:
                return read

    taken: list[Settings] = []

    async def take_over(new: Settings) -> None:
        taken.append(new)
        if len(taken) == 1:
            raise OSError("no room")

    caplog.set_level(logging.INFO)
    configuration = Configuration(old, load)
    await configuration.reload(take_over)
    assert not taken and configuration.settings is old
    assert "the configuration cannot be used: server.prot: there is no such setting" in caplog.text
    (note,) = configuration.notes
    assert "could not be reloaded" in note and "prot" not in note, "anybody may ask whether the server is ready"
    await configuration.reload(take_over)
    assert len(taken) == 1 and configuration.settings is old
    assert "no room" in caplog.text and "could not be taken over" in configuration.notes[0]
    await configuration.reload(take_over)
    assert configuration.settings is taken[1] and configuration.notes == ()


async def test_what_needs_a_restart_is_noted_until_there_is_one() -> None:
    """A reload that fails behind it changes nothing about that."""
    new = settings(log={"content": True})
    taken: list[Settings] = []

    def load() -> Settings:
        if len(taken) == 1 and "could not be reloaded" not in configuration.notes[0]:
            raise ConfigurationError("wrong")
        return settings() if taken else new

    async def take_over(read: Settings) -> None:
        taken.append(read)
        if len(taken) == 2:
            raise OSError("no room")

    pending = "changed, and needs a restart: log.content"
    configuration = Configuration(settings(), load)
    assert configuration.noted("listening") == "listening"
    await configuration.reload(take_over)
    assert list(configuration.notes) == [pending] and configuration.noted("listening") == f"listening; {pending}"
    for said in ("could not be reloaded", "could not be taken over"):
        await configuration.reload(take_over)
        failure, also = list(configuration.notes)
        assert said in failure and also == pending
    await configuration.reload(take_over)
    assert list(configuration.notes) == []


# ---- the server ----


async def test_the_server_serves_by_the_new_settings() -> None:
    """Providers, limits, who may come in and who they are."""
    async with ScriptedProvider() as provider:
        provider.handle(lambda _: Reply.json({}))
        url = provider.url + "/v1"
        old = settings(providers={"openai": {"base_url": url, "api_key": "old"}})
        new = settings(
            providers={"openai": {"base_url": url, "api_key": "new"}, "more": {"kind": "openai", "base_url": url}},
            limits={"max_body_bytes": 10},
            identity={"header": "X-User"},
            server={"allowed_hosts": ["gateway.internal"]},
        )
        server = Server(old, recorder=MemoryRecorder())

        async def asked(path: str, *fields: tuple[bytes, bytes], body: bytes = b"") -> int:
            return (await call(server, scope("POST" if body else "GET", path, fields), body, actor=None)).status

        named = (b"x-user", b"alice")
        async with server:
            assert await asked(MODELS) == 200
            assert await asked("/more/v1/models", named) == 404
            await server.reload(new)
            assert await asked(MODELS) == 401
            assert await asked(MODELS, named) == await asked("/more/v1/models", named) == 200
            assert await asked("/openai/v1/conversations", named, (b"content-length", b"11"), body=b"x" * 11) == 413
            foreign = [(b"host", b"gateway.internal"), named]
            given = {**scope("GET", MODELS), "headers": foreign}
            assert (await call(server, given, actor=None)).status == 200
            await server.reload(old)
            assert (await call(server, given, actor=None)).status == 403
            assert await asked(MODELS) == 200
        keys = [received.header("authorization") for received in provider.requests]
        assert keys == [["Bearer old"], ["Bearer new"], [], ["Bearer new"], ["Bearer old"]]


async def test_ready_in_spite_of_a_configuration_that_could_not_be_reloaded() -> None:
    server = Server(settings(), recorder=MemoryRecorder())
    server.notes = ["it could not be reloaded"]
    ready = await call(server, scope("GET", "/readyz"))
    assert (ready.status, ready.json()) == (200, {"ready": True, "reasons": [], "notes": ["it could not be reloaded"]})


# ---- the process ----


@pytest.fixture
def provider() -> Iterator[ThreadedProvider]:
    with ThreadedProvider(answer) as provider:
        yield provider


def gateway_at(provider: ThreadedProvider, toml: str = "", workers: int = 1) -> Gateway:
    env = {"AIBRIDGE_SERVER__WORKERS": str(workers)}
    return Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1", toml=toml, env=env)


async def hup(gateway: Gateway, says: str) -> None:
    before = gateway.output.count(says)
    gateway.process.send_signal(signal.SIGHUP)
    await until(lambda: gateway.output.count(says) > before, f"it does not say {says!r}")


async def until_noted(gateway: Gateway, holds: Callable[[list[str]], bool]) -> None:
    """Return when all workers say that they are ready, and beside it what should be."""
    in_turn = 0
    async with asyncio.timeout(30):
        while in_turn < 8:
            async with RawClient(gateway.url) as client:
                answered = await client.request("GET", "/readyz")
            assert answered.head.status == 200
            in_turn = in_turn + 1 if holds(json.loads(answered.body).get("notes", [])) else 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_key_in_a_file_is_read_anew(provider: ThreadedProvider, tmp_path: Path, workers: int) -> None:
    """Without any change of the configuration itself: how a secret is rotated."""
    secret = tmp_path / "key"
    secret.write_text("sk-first")
    given = f'[providers.anthropic]\nbase_url = "{provider.url}"\napi_key = {{ file = "{secret}" }}'
    with gateway_at(provider, given, workers) as gateway:
        await ask(gateway.url, MESSAGES)
        secret.write_text("sk-second")
        await hup(gateway, "the configuration was reloaded")

        async def rotated() -> bool:
            for _ in range(8):
                await ask(gateway.url, MESSAGES)
            return all(one.header("x-api-key") == ["sk-second"] for one in provider.requests[-8:])

        async with asyncio.timeout(30):
            while not await rotated():
                pass
        assert provider.requests[0].header("x-api-key") == ["sk-first"]
        assert "sk-" not in gateway.output


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_file_that_cannot_be_used(provider: ThreadedProvider, tmp_path: Path, workers: int) -> None:
    """It says what ``aibridge check`` says, and all workers tell who asks, those too that start later."""
    wrong = '[server]\nprot = 1\n[providers.openai]\nbase_url = "nonsense"\n'
    (tmp_path / "aibridge.toml").write_text(wrong)
    told, *said = process("check", folder=tmp_path).stdout.removeprefix("Error: ").splitlines()
    assert len(said) == 2
    with gateway_at(provider, workers=workers) as gateway:
        gateway.configure(wrong)
        await hup(gateway, "the old configuration still holds")
        assert all(f"{told} {line}\n" in gateway.output for line in said)
        assert (await ask(gateway.url, MESSAGES)).status == 200
        await until_noted(gateway, lambda notes: len(notes) == 1 and "could not be reloaded" in notes[0])
        (gateway.folder / "aibridge.toml").unlink()
        await hup(gateway, "there is no configuration file aibridge.toml")
        gateway.configure("[database]\nwhen_unavailable = 'continue'")
        await hup(gateway, "changes that need a restart: database.when_unavailable")
        needs_a_restart = ["changed, and needs a restart: database.when_unavailable"]
        await until_noted(gateway, lambda notes: notes == needs_a_restart)
        gateway.configure("")
        await hup(gateway, "the configuration was reloaded")
        await until_noted(gateway, lambda notes: notes == [])


async def test_a_worker_that_cannot_take_it_over_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """It alone may have no room for what is new: then it serves as before, and who asks it gets to know."""

    class Failing(Service):
        async def reload(self, settings: Settings) -> None:
            raise OSError("no room")

    server = Server(settings(), recorder=MemoryRecorder())
    service = Failing(server, settings(), shared=True)
    await take_over(service, Reload(1, settings(), ("a note",)))
    assert list(server.notes) == ["a note"] and not caplog.text, "nothing has changed for it"
    await take_over(service, Reload(2, settings(limits={"max_body_bytes": 5}), ("a note",)))
    assert list(server.notes[1:]) == ["a note"]
    assert "could not be taken over" in server.notes[0] and "no room" in caplog.text


async def test_workers_that_could_not_take_it_over_try_again(provider: ThreadedProvider) -> None:
    """With the next SIGHUP, though the file is the same. What fails here is to open the history of conversations."""
    with gateway_at(provider, workers=2) as gateway:
        gateway.configure(toml({"sums": {"command": SUMS, "start_timeout": 30}}))
        aside = gateway.database.rename(gateway.folder / "aside")
        gateway.database.mkdir()
        gateway.process.send_signal(signal.SIGHUP)
        await until(lambda: gateway.output.count("could not be taken over") == 2, "they take it over")
        gateway.database.rmdir()
        aside.rename(gateway.database)
        await hup(gateway, "the configuration was reloaded")
        await until_noted(gateway, lambda notes: notes == [])


async def test_a_worker_that_starts_later_has_the_new_configuration(provider: ThreadedProvider) -> None:
    with gateway_at(provider, workers=2) as gateway:
        gateway.configure(f'[providers.later]\nkind = "anthropic"\nbase_url = "{provider.url}"')
        await hup(gateway, "the configuration was reloaded")
        for pid in re.findall(r"is ready \(process (\d+)", gateway.output):
            os.kill(int(pid), signal.SIGKILL)
        await until(lambda: gateway.output.count("is ready") == 4, "they are not replaced")
        for _ in range(8):
            async with RawClient(gateway.url) as client:
                assert (await client.request("GET", "/later/v1/models")).head.status == 200


def offered(provider: ThreadedProvider) -> Sequence[str]:
    """The tools of the last request."""
    return sorted(name_of(tool) for tool in provider.requests[-1].json().get("tools", []))


async def converse(gateway: Gateway, conversation: Sequence[dict[str, Any]]) -> dict[str, Any]:
    async with RawClient(gateway.url) as client:
        headers = [("Content-Type", "application/json")]
        answered = await client.request("POST", DIALECT.path, headers, DIALECT.request(conversation, stream=False))
        found: dict[str, Any] = json.loads(answered.body)
        return found


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


async def test_tools_come_and_go_and_a_conversation_keeps_its_own(provider: ThreadedProvider) -> None:
    """And a server whose settings are the same is not started again."""
    call = Calls("call_1", "bmcp_sums_add", '{"a": 1, "b": 2}')
    said = iter([turn(1, call), turn(2, Says("Three.")), *(turn(number, Says("Yes.")) for number in range(3, 9))])
    provider.handle(lambda received: reply(DIALECT, next(said), received.json()))
    first = toml({"sums": {"command": SUMS, "start_timeout": 30, "allow": ["^add$"]}})
    with gateway_at(provider, first) as gateway:
        question = {"role": "user", "content": "How many?"}
        answered = await converse(gateway, [question])
        assert answered["content"][-1]["text"] == "Three."
        running = children(gateway.process.pid)
        assert len(running) == 1

        gateway.configure(first + "[limits]\nmax_body_bytes = 100000\n")
        await hup(gateway, "the configuration was reloaded")
        assert children(gateway.process.pid) == running

        gateway.configure(toml({"more": {"command": SUMS, "start_timeout": 30, "allow": ["^fail$"]}}))
        await hup(gateway, "the configuration was reloaded")
        await until(lambda: len(children(gateway.process.pid)) == 1 and children(gateway.process.pid) != running, "it stays")
        await converse(gateway, [{"role": "user", "content": "Another thing."}])
        assert offered(provider) == ["bmcp_more_fail"]
        more = [question, {"role": "assistant", "content": answered["content"]}, {"role": "user", "content": "Sure?"}]
        await converse(gateway, more)
        assert offered(provider) == ["bmcp_sums_add"]

        gateway.configure("")
        await hup(gateway, "the configuration was reloaded")
        await until(lambda: not children(gateway.process.pid), "the server is still there")
        await converse(gateway, [{"role": "user", "content": "A third thing."}])
        assert offered(provider) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_the_order_to_stop_ends_a_reload(provider: ThreadedProvider, tmp_path: Path, workers: int) -> None:
    """An MCP server that says nothing would keep it for as long as `start_timeout`."""
    silent = f"import pathlib, time; pathlib.Path({str(tmp_path / 'started')!r}).touch(); time.sleep(600)"
    with gateway_at(provider, workers=workers) as gateway:
        gateway.configure(toml({"silent": {"command": [sys.executable, "-c", silent], "start_timeout": 600}}))
        gateway.process.send_signal(signal.SIGHUP)
        wait_until((tmp_path / "started").exists, "the server is not started")
        assert gateway.stop() == -signal.SIGTERM
        assert "Traceback" not in gateway.output
