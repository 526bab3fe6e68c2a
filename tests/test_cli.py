"""The command line.

Truth: design.md section 3 for the commands and options; what they print and their exit status is our choice.
"""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aibridge import __version__
from aibridge.cli import main
from tests.support.gateway import Gateway
from tests.support.provider import Received, Reply, ThreadedProvider

SECRET = "sk-very-secret-9f8e7d6c"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an environment without settings and proxies."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.upper().startswith(("AIBRIDGE_", "ANTHROPIC_", "OPENAI_")) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    return tmp_path


def run(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
    result = CliRunner().invoke(main, arguments, env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert SECRET not in result.output and "Traceback" not in result.output
    return result


# ---- help and versions ----


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(option: str) -> None:
    result = run(option)
    assert result.exit_code == 0
    for command in ("serve", "check", "demo"):
        assert re.search(rf"^  {command} +\w", result.output, re.MULTILINE)
        described = run(command, option)
        assert described.exit_code == 0 and len(described.output.splitlines()) > 4
    assert "127.0.0.1" in run("serve", option).output and "8080" in run("serve", option).output


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0 and __version__ in result.output


@pytest.mark.parametrize(
    "arguments", [["--nope"], ["nope"], ["serve", "--nope"], ["serve", "--port", "x"], ["serve", "extra"]]
)
def test_what_is_no_command(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and "Usage:" in result.output


@pytest.mark.parametrize("command", [[sys.executable, "-m", "aibridge"], [str(Path(sys.executable).with_name("aibridge"))]])
def test_as_a_process(command: list[str]) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "") and __version__ in done.stdout


# ---- serve: what is refused before anything starts ----


@pytest.mark.parametrize("command", ["serve", "check"])
@pytest.mark.parametrize(
    ("toml", "said"),
    [
        (
            "[server]\nprot = 1",
            "server.prot: there is no such setting; valid here: allowed_hosts, ",
        ),
        ('[server]\nport = "x"', "server.port: must be a valid integer"),
        ("[server\n", "aibridge.toml is not TOML"),
        (f'[providers.openai]\napi_key = ["{SECRET}"]', "providers.openai.api_key: a secret is"),
        ('[server]\nhost = "0.0.0.0"', "identity.header"),
        ('[providers.openai]\nbase_url = "http://localhost:8080/openai/v1"', "points at this gateway itself"),
    ],
)
def test_a_configuration_that_cannot_be_used(command: str, toml: str, said: str) -> None:
    Path("aibridge.toml").write_text(toml)
    result = run(command)
    assert result.exit_code == 1
    assert result.output.startswith("Error: the configuration cannot be used:\n") and said in result.output
    assert not Path("aibridge.db").exists()


def test_a_configuration_file_that_is_not_there() -> None:
    result = run("serve", "--config", "nope.toml")
    assert result.exit_code == 1 and "there is no configuration file nope.toml" in result.output


def test_mistakes_on_the_command_line() -> None:
    assert "server.port: must be less than or equal to 65535" in run("serve", "--port", "70000").output
    result = run("serve", "--host", "0.0.0.0")
    assert result.exit_code == 1 and "requests must be authenticated" in result.output and "127.0.0.1" in result.output


def test_the_command_line_is_stronger(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("aibridge.process.serve", lambda settings, *_: started.append(settings))
    Path("other.toml").write_text('[server]\nhost = "::1"\nport = 1')
    monkeypatch.setenv("AIBRIDGE_SERVER__PORT", "2")
    for arguments in ([], ["--port", "3"], ["--host", "127.0.0.2", "--port", "3"]):
        assert run("serve", "--config", "other.toml", *arguments).exit_code == 0
    assert [(settings.server.host, settings.server.port) for settings in started] == [
        ("::1", 2),
        ("::1", 3),
        ("127.0.0.2", 3),
    ]


# ---- serve: as a process ----


def process(*arguments: str, folder: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A run that has to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "aibridge", *arguments],
        cwd=folder,
        env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "LOGNAME": "user", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


def test_serving_and_stopping() -> None:
    with Gateway() as gateway:
        assert gateway.database.exists()
        assert "listening on http://127.0.0.1:" in gateway.output
        status = gateway.stop()
        assert status in (0, -signal.SIGTERM), "as the signal that it obeyed"
        assert "Traceback" not in gateway.output and "ERROR" not in gateway.output


def test_stopping_at_the_keyboard() -> None:
    with Gateway() as gateway:
        gateway.process.send_signal(signal.SIGINT)
        gateway.process.wait(15)
        assert gateway.process.returncode in (0, 1, 130, -signal.SIGINT)
        assert "Traceback" not in gateway.output


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = process("serve", "--port", str(taken.getsockname()[1]), folder=tmp_path)
    assert done.returncode != 0
    assert "address already in use" in done.stdout and "Traceback" not in done.stdout


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = process("serve", "--port", "0", folder=tmp_path, env={"AIBRIDGE_DATABASE__URL": "sqlite:///file/a.db"})
    assert done.returncode != 0
    assert "cannot start: " in done.stdout and "file/a.db-spool" in done.stdout and "Traceback" not in done.stdout


def test_a_database_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "aibridge.db").write_bytes(b"no database " * 100)
    done = process("serve", "--port", "0", folder=tmp_path)
    assert done.returncode != 0
    assert "aibridge.db cannot be opened: file is not a database" in done.stdout and "Traceback" not in done.stdout


def test_another_address_without_an_authenticator(tmp_path: Path) -> None:
    done = process("serve", "--host", "0.0.0.0", "--port", "0", folder=tmp_path)
    assert done.returncode == 1 and "identity.trusted_proxies" in done.stdout and "127.0.0.1" in done.stdout
    assert not (tmp_path / "aibridge.db").exists()


# ---- check ----


@pytest.fixture
def provider() -> Iterator[ThreadedProvider]:
    with ThreadedProvider() as provider:
        yield provider


def checked(provider: ThreadedProvider, toml: str = "", **env: str) -> Result:
    """``aibridge check`` with both providers at the scripted one."""
    Path("aibridge.toml").write_text(toml)
    return run("check", env={"ANTHROPIC_BASE_URL": provider.url, "OPENAI_BASE_URL": f"{provider.url}/v1", **env})


def lines_of(result: Result) -> dict[str, str]:
    """What is said about each provider: "ok" or "FAIL", and the rest of the line."""
    found = re.findall(r"^(ok  |FAIL) (\S+): (.*)$", result.output, re.MULTILINE)
    return {name: f"{verdict.strip()} {text}" for verdict, name, text in found}


def test_check_of_providers_that_answer(provider: ThreadedProvider) -> None:
    provider.handle(lambda _: Reply.json({"data": []}))
    result = checked(provider, ANTHROPIC_API_KEY=SECRET, OPENAI_API_KEY=f"{SECRET}-2")
    assert result.exit_code == 0
    assert lines_of(result) == {
        "anthropic": f"ok {provider.url}/v1/models answers with HTTP 200",
        "openai": f"ok {provider.url}/v1/models answers with HTTP 200",
    }
    asked = {
        received.header("x-api-key")[0] if received.header("x-api-key") else "": received for received in provider.requests
    }
    assert all((received.method, received.target) == ("GET", "/v1/models") for received in provider.requests)
    assert asked[SECRET].header("anthropic-version") and not asked[SECRET].header("authorization")
    assert asked[""].header("authorization") == [f"Bearer {SECRET}-2"]


def test_check_prints_the_configuration_without_secrets(provider: ThreadedProvider) -> None:
    provider.handle(lambda _: Reply.json({}))
    toml = f'[server]\nport = 8123\n[providers.vllm]\nkind = "openai"\nbase_url = "{provider.url}/x"\napi_key = "{SECRET}"'
    result = checked(provider, toml)
    assert "port = 8123" in result.output and "[providers.vllm]" in result.output and 'api_key = "***' in result.output
    assert set(lines_of(result)) == {"anthropic", "openai", "vllm"}
    assert "\ntraces: none are sent: there is no endpoint\n" in result.output
    assert "[providers.anthropic]" in result.output, "what is there by default is shown too"


@pytest.mark.parametrize("status", [401, 403])
def test_check_of_a_key_that_is_refused(provider: ThreadedProvider, status: int) -> None:
    provider.handle(lambda _: Reply.json({"error": {"message": f"bad key {SECRET}"}}, status))
    result = checked(provider, ANTHROPIC_API_KEY=SECRET)
    assert result.exit_code == 1
    found = lines_of(result)
    assert found["anthropic"] == f"FAIL {provider.url}/v1/models refuses the configured api_key (HTTP {status})"
    assert found["openai"].startswith("ok ") and "clients have to bring" in found["openai"]


def test_check_without_keys_is_fine(provider: ThreadedProvider) -> None:
    provider.handle(lambda _: Reply.json({}, 401))
    assert checked(provider).exit_code == 0


@pytest.mark.parametrize("status", [500, 503, 529])
def test_check_of_a_provider_in_trouble(provider: ThreadedProvider, status: int) -> None:
    provider.handle(lambda _: Reply.json({}, status))
    result = checked(provider)
    assert result.exit_code == 1 and f"answers with HTTP {status}" in lines_of(result)["openai"]


def test_check_of_a_provider_that_is_not_there(provider: ThreadedProvider) -> None:
    provider.handle(lambda _: Reply.json({}))
    result = checked(provider, OPENAI_BASE_URL="http://127.0.0.1:9/v1")
    assert result.exit_code == 1
    assert lines_of(result)["openai"].startswith("FAIL http://127.0.0.1:9/v1/models: ")
    assert "refused" in lines_of(result)["openai"] and lines_of(result)["anthropic"].startswith("ok ")


def test_check_of_a_provider_that_says_nothing(provider: ThreadedProvider) -> None:
    async def silence(received: Received) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    provider.handle(silence)
    result = run(
        "check", "--timeout", "0.2", env={"ANTHROPIC_BASE_URL": provider.url, "OPENAI_BASE_URL": f"{provider.url}/v1"}
    )
    assert result.exit_code == 1
    assert all("did not answer within 0.2 seconds" in said for said in lines_of(result).values())


def test_check_leaves_out_what_is_off(provider: ThreadedProvider) -> None:
    provider.handle(lambda _: Reply.json({}))
    result = checked(provider, "[providers.openai]\nenabled = false")
    assert set(lines_of(result)) == {"anthropic"} and result.exit_code == 0


def test_check_as_a_process(provider: ThreadedProvider, tmp_path: Path) -> None:
    provider.handle(lambda _: Reply.json({}))
    env = {"ANTHROPIC_BASE_URL": provider.url, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": SECRET}
    done = process("check", folder=tmp_path, env=env)
    assert done.returncode == 1 and "ok   anthropic:" in done.stdout and "FAIL openai:" in done.stdout
    assert SECRET not in done.stdout and "Traceback" not in done.stdout
    assert not (tmp_path / "aibridge.db").exists(), "it looks, and changes nothing"
