"""What can be said of a server, and what is never shown of it. Truth: our choice (design.md 3), RFC 9110 for headers."""

from typing import Any

import pytest

from aibridge.mcp.settings import McpServer, check_name, printable

SECRET = "hunter2-and-more"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "either a url or a command"),
        ({"url": "http://h/mcp", "command": ("x",)}, "either a url or a command"),
        ({"url": "ftp://h/mcp"}, "http:// or https://"),
        ({"url": "http:///mcp"}, "http:// or https://"),
        ({"url": "http://h:port/mcp"}, "http:// or https://"),
        ({"url": "http://h/", "transport": "stdio"}, "transport"),
        ({"url": "http://h/", "env": {"A": "b"}}, "env is for"),
        ({"url": "http://h/", "headers": {"a b": "c"}}, "'a b' cannot be sent"),
        ({"url": "http://h/", "headers": {"a": f"{SECRET}\r\nb: c"}}, "'a' cannot be sent"),
        ({"command": ("x",), "headers": {"a": "b"}}, "with a url"),
        ({"command": ("x",), "transport": "sse"}, "with a url"),
        ({"command": ("",)}, "must name a program"),
        ({"command": ("x", "\0")}, "no NUL"),
        ({"command": ("x",), "allow": ("(",)}, "not a regular expression"),
        ({"command": ("x",), "deny": ("*",)}, "not a regular expression"),
        ({"command": ("x",), "call_timeout": 0}, "call_timeout must be more than 0"),
        ({"command": ("x",), "max_concurrent_calls": 0}, "max_concurrent_calls must be"),
        ({"command": ("x",), "max_tools": 0}, "max_tools must be"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        McpServer(**wrong)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("name", ["", "-a", "A", "a_b", "a.b", "a" * 33, "é"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "deep-wiki", "0", "a" * 32])
def test_names_that_can_be(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    ("server", "where"),
    [
        (McpServer(url=f"https://me:{SECRET}@h.example:8443/mcp?key={SECRET}#x"), "https://h.example:8443/mcp"),
        (McpServer(url="http://[::1]:80/mcp"), "http://[::1]:80/mcp"),
        (McpServer(command=("npx", "-y", "server")), "npx -y server"),
        (McpServer(command=("server", "--api-key", SECRET, "--port", "1")), "server --api-key *** --port 1"),
        (McpServer(command=("server", f"--token={SECRET}")), "server --token=***"),
        (McpServer(command=("server", "--auth", "--port", "1")), "server --auth --port 1"),
        (McpServer(command=("pg", f"postgres://me:{SECRET}@db/x")), "pg postgres://***@db/x"),
        (McpServer(command=("server", f"x{SECRET}"), env={"KEY": SECRET}), "server x***"),
    ],
)
def test_where_it_is_shows_no_secret(server: McpServer, where: str) -> None:
    assert server.where == where
    assert SECRET not in repr(server)


def test_what_is_masked() -> None:
    http = McpServer(url=f"http://me:pass-word@h/?k={SECRET}", headers={"authorization": "Bearer sk-12345", "x": "1"})
    assert http.masked(f"a sk-12345 Bearer sk-12345 pass-word {SECRET} 1") == "a *** *** *** *** 1"
    stdio = McpServer(command=("x",), env={"A": "abcd", "B": "abcdefgh", "C": "1"})
    assert stdio.masked("abcdefgh abcd 1") == "*** *** 1"  # the longer secret first


def test_what_cannot_be_seen_is_escaped() -> None:
    """Terminals act on C0 and C1 controls (ECMA-48); the rest could pass for something else."""
    said = "a\x1b[2J\r\n\x9b1m\u202ebé 漢 \U0001f600"
    assert printable(said) == "a\\x1b[2J\\r\\n\\x9b1m\\u202ebé 漢 \U0001f600"
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
