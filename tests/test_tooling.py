"""``aibridge mcp``.

Truth: the issue for the commands and what they show (servers, state, tools, why filtered out); their wording and exit status
is our choice. The servers are real ones.
"""

import json
import os
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aibridge.cli import main
from tests.support.mcp_servers import command

TIME = [sys.executable, "-m", "mcp_server_time"]
SECRET = "hunter2-and-more"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.upper().startswith("AIBRIDGE_"):
            monkeypatch.delenv(name)
    return tmp_path


def configured(**servers: dict[str, Any]) -> None:
    lines = []
    for name, server in servers.items():
        lines += [f"[mcp.servers.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in server.items())]
    Path("aibridge.toml").write_text("\n".join(lines).replace('{"K": ', "{ K = "))


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["mcp", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert SECRET not in result.output and "Traceback" not in result.output
    return result


def test_servers_and_tools_and_why_some_are_left_out() -> None:
    configured(
        time={"command": TIME, "deny": ["^convert"]},
        gone={"url": f"http://user:{SECRET}@127.0.0.1:9/mcp?key={SECRET}", "headers": {"K": SECRET}, "start_timeout": 1},
    )
    result = run("list")
    assert result.exit_code == 1, "one of them is not connected"
    assert re.search(r"^time .* connected .*mcp-time", result.output, re.MULTILINE)
    assert "+  get_current_time: bmcp_time_get_current_time" in result.output
    assert re.search(r"-  convert_time: .*\^convert", result.output)
    assert re.search(r"^gone .* failed", result.output, re.MULTILINE)
    assert not Path("aibridge.db").exists(), "looking leaves nothing behind"


def test_all_is_well() -> None:
    configured(time={"command": TIME, "allow": ["^get_current_time$"]})
    result = run("list")
    assert result.exit_code == 0
    assert re.search(r"-  convert_time: \w+", result.output)


def test_without_servers() -> None:
    assert run("list").output == "No MCP servers are configured.\n"


def test_a_call() -> None:
    configured(time={"command": TIME})
    result = run("call", "time", "get_current_time", '{"timezone": "UTC"}')
    assert (result.exit_code, json.loads(result.output)["timezone"]) == (0, "UTC")


def test_a_call_that_fails() -> None:
    configured(time={"command": TIME})
    result = run("call", "time", "get_current_time", '{"timezone": "Mars/Olympus"}')
    assert result.exit_code == 1 and "Mars/Olympus" in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["call", "time", "nope"], 1, "get_current_time"),
        (["call", "nope", "x"], 1, "configured: time"),
        (["call", "time", "get_current_time", "[1]"], 2, "JSON object"),
        (["call", "time", "get_current_time", "{"], 2, "JSON object"),
        (["approve", "nope"], 1, "configured: time"),
        (["approve", "time", "nope"], 1, "get_current_time"),
    ],
)
def test_what_cannot_be_called(arguments: list[str], status: int, said: str) -> None:
    configured(time={"command": TIME})
    result = run(*arguments)
    assert result.exit_code == status and said in result.output


def test_looking_and_calling_approve_nothing() -> None:
    configured(time={"command": TIME, "on_change": "withhold"})
    assert re.search(r"-  convert_time: not approved yet$", run("list").output, re.MULTILINE)
    assert "not approved yet" in run("call", "time", "get_current_time", '{"timezone": "UTC"}').output
    assert [path.name for path in Path().iterdir()] == ["aibridge.toml"]
    assert run("approve", "time", "convert_time").exit_code == 0
    configured(time={"command": TIME, "on_change": "withhold"})
    assert "+  convert_time: bmcp_time_convert_time" in run("list").output
    with closing(sqlite3.connect("aibridge.db")) as database:
        before = database.execute("SELECT * FROM aibridge_mcp_tools").fetchall()
        database.execute("DROP TABLE aibridge_mcp_tools")
    assert before
    assert run("list").exit_code == 0, "a database of another version is left as it is"


def test_definitions_are_shown_on_demand() -> None:
    configured(time={"command": TIME, "allow": ["^get_"]})
    assert "IANA timezone" not in run("list").output
    listed = run("list", "--verbose").output
    assert re.search(r"^       Get current time", listed, re.MULTILINE)
    assert json.loads(re.findall(r"^       (\{.*\})$", listed, re.MULTILINE)[0])["type"] == "object"


def test_what_servers_say_is_printed_and_not_obeyed() -> None:
    configured(raw={"command": command("raw", "escapes")})
    for arguments in (["list"], ["list", "-v"], ["call", "raw", "nope"], ["call", "raw", "t\x1b[1A"], ["approve", "raw"]):
        output = run(*arguments).output
        assert re.fullmatch(r"[\x20-\x7e\n\t]*", output), output
        assert "\\x1b[" in output
        assert not re.search("^second", output, re.MULTILINE)
    assert run("call", "raw", "t\x1b[1A").output == "401 for None\\x1b[2J\n\tthe end\n"


def test_a_changed_definition_is_shown_and_withheld_until_it_is_approved() -> None:
    configured(time={"command": TIME, "on_change": "withhold"})
    assert run("approve", "time").output == "approved: convert_time, get_current_time\n"
    with closing(sqlite3.connect("aibridge.db", isolation_level=None)) as database:
        database.execute("UPDATE aibridge_mcp_tools SET digest = 'another' WHERE tool = 'convert_time'")
    listed = run("list").output
    assert re.search(r"-  convert_time: .*\[changed since it was approved\]", listed)
    assert run("call", "time", "convert_time").exit_code == 1
    assert run("approve", "time", "convert_time").output == "approved: convert_time\n"
    assert "changed" not in run("list").output
