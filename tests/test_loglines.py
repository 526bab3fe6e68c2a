"""Lines of the log as text and as JSON, whatever they hold.

Truth: issue 5 ("JSON or console"); Unicode's categories, as str.isprintable has them, for what can be printed; that nothing
from outside may break a line or a terminal is our promise (docs/operations.md).
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from hypothesis import given, strategies as st

from aibridge.loglines import MAX_NAME, Console, IncidentLine, InterceptionLine, LogLine, as_json, plain, plain_lines
from aibridge.logs import Log

NOW = datetime(2026, 11, 22, 8, 30, 0, 123_456, tzinfo=UTC)

# ---- text from outside ----

HOSTILE = "gpt\n2026-11-22 08:30:00.000 ERROR    aibridge: forged\x1b[2J\x1b]0;title\x07\r\x00\x9b31m\u2028\x85\u202e"


@pytest.mark.parametrize("text", ["", "claude-haiku-4-5", "Modèle 模型 🙂", "a b=c"])
def test_what_can_be_printed_stays(text: str) -> None:
    assert plain(text) == text


def test_what_cannot_is_escaped() -> None:
    assert plain("a\nb\x1b[0m\x9b\u2028\u202e\ud800") == "a\\nb\\x1b[0m\\x9b\\u2028\\u202e\\ud800"


def test_what_is_too_long_is_cut() -> None:
    assert plain("x" * MAX_NAME) == "x" * MAX_NAME
    assert plain("x" * (MAX_NAME + 1)) == "x" * (MAX_NAME - 1) + "…"
    text = plain_lines("first\n" + "middle\n" * 5000 + "last", 1000)
    assert text.startswith("first\nmiddle") and text.endswith("middle\nlast") and "\n…\n" in text and len(text) < 1010


def assert_one_printable_line(line: bytes) -> None:
    text = line.decode()
    assert text.endswith("\n") and text[:-1].isprintable(), text


@given(st.text(alphabet=st.characters(exclude_categories=[]), max_size=300))
def test_no_text_breaks_a_line(text: str) -> None:
    line = InterceptionLine(
        time=NOW,
        level="info",
        logger="x",
        message="m",
        interception_id="i",
        actor=plain(text),
        provider="p",
        model=plain(text),
        route="/r",
        streaming=True,
        error=plain(text),
    )
    assert_one_printable_line(as_json(line))
    assert_one_printable_line(Console()(line))
    assert json.loads(as_json(line))["actor"] == plain(text)
    assert len(plain(text)) <= 10 * MAX_NAME


def test_where_a_field_ends_in_the_console() -> None:
    """A name cannot make up another field."""
    line = IncidentLine(
        time=NOW, level="warning", logger="x", message="m", provider="p", model='a status="b"', actor="", reason="r\\"
    )
    shown = Console()(line).decode()
    assert shown.endswith('WARNING  x: m provider=p model="a status=\\"b\\"" actor="" reason="r\\\\"\n')


def test_the_console() -> None:
    line = LogLine(
        time=NOW, level="error", logger="aibridge.server", worker=3, message="it failed", exception="Traceback:\n  x"
    )
    local = NOW.astimezone().strftime("%Y-%m-%d %H:%M:%S.123")
    assert Console()(line).decode() == f"{local} ERROR    aibridge.server [worker 3]: it failed\n    Traceback:\n      x\n"
    assert "\x1b[31mERROR   \x1b[0m aibridge" in Console(colours=True)(line).decode()


@pytest.mark.parametrize(
    ("terminal", "environment", "coloured"),
    [(False, {}, False), (True, {}, True), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_colours_on_a_terminal_only(
    terminal: bool, environment: Mapping[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """no-color.org; a real terminal, as the kernel has it."""
    for name, value in {"NO_COLOR": "", "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    read, write = os.openpty() if terminal else os.pipe()
    try:
        log = Log("console", file=write)
        log.handle(logging.makeLogRecord({"name": "x", "levelno": logging.WARNING, "msg": "hello"}))
        assert ("\x1b[33m" in os.read(read, 1000).decode()) is coloured
        log.close()
    finally:
        os.close(read)
        os.close(write)
