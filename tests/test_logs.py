"""The log: what lines say, in both formats, and that nothing can break one.

Truth: issue 5 ("one line when an interception starts and one when it ends, with ids, actor, model, tokens, timings, outcome;
nothing secret, no content by default"); RFC 8259 for JSON; the names of fields are ours (docs/operations.md).
"""

import asyncio
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

from aibridge import logs
from aibridge.errors import RefusalReason
from aibridge.events import BreakerChanged, CallBegan, Committed, Event, PassedThrough, RecordLost, Refused, Retried
from aibridge.loglines import (
    MAX_EXCEPTION,
    IncidentLine,
    InterceptionLine,
    LogFormat,
    LogLevel,
    LogLine,
)
from aibridge.logs import EventLog, Log, logging_to_stderr, set_level
from aibridge.records import Interception, InterceptionEnded, PromptUsage, TokenUsage, ToolUsage
from tests.test_loglines import HOSTILE, NOW

DOCUMENTATION = Path(__file__).parent.parent / "docs" / "operations.md"
FORMATS: list[LogFormat] = ["console", "json"]


class Captured:
    """A log in one format, and what has come out of it."""

    def __init__(self, format: LogFormat = "json", worker: int | None = None) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        self.log = Log(format, worker=worker, file=self._write)
        self._text = b""

    @property
    def text(self) -> str:
        while True:
            try:
                more = os.read(self._read, 65536)
            except BlockingIOError:
                return self._text.decode()
            self._text += more

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All of them are JSON, and each ends."""
        assert self.text.endswith("\n") or not self.text
        return [json.loads(line) for line in self.text.splitlines()]

    def close(self) -> None:
        self.log.close()
        os.close(self._write)
        os.close(self._read)


@pytest.fixture
def capture() -> Iterator[Callable[..., Captured]]:
    made: list[Captured] = []

    def make(format: LogFormat = "json", worker: int | None = None) -> Captured:
        made.append(Captured(format, worker))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The tests' own logging comes back, whatever was set up."""
    loggers = [logging.getLogger(name) for name in ("", "aibridge", "aibridge.events", "alembic", "httpx2", "mcp")]
    levels = [one.level for one in loggers]
    handlers = logging.getLogger().handlers[:]
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    set_level("info")
    yield
    logging.captureWarnings(capture=False)
    sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
    logging.getLogger().handlers[:] = handlers
    for one, level in zip(loggers, levels, strict=True):
        one.setLevel(level)


def logged(captured: Captured, name: str = "some.library") -> logging.Logger:
    """A logger that leads nowhere else."""
    logger = logging.getLogger(f"test.{name}")
    logger.propagate = False
    logger.setLevel(1)
    logger.handlers[:] = [captured.log]
    return logger


# ---- the standard library's loggers ----


def test_a_line_of_a_library(capture: Callable[..., Captured]) -> None:
    captured = capture(worker=2)
    logged(captured).warning("%d of %s", 3, "them")
    (line,) = captured.lines
    assert datetime.fromisoformat(line.pop("time")).utcoffset() == timedelta(0)
    assert line == {"level": "warning", "logger": "test.some.library", "worker": 2, "message": "3 of them"}


def test_a_line_of_a_library_cannot_be_broken_either(capture: Callable[..., Captured]) -> None:
    """What has several lines keeps them: within JSON, and indented in the console."""
    for one in FORMATS:
        captured = capture(one)
        logged(captured, HOSTILE).error("first\n\tsecond: %s", HOSTILE)
        assert captured.text.endswith("\n") and all(line.isprintable() for line in captured.text[:-1].split("\n"))
        if one == "json":
            assert captured.lines[0]["message"].startswith("first\n        second: gpt\n2026-")
        else:
            begin, *rest = captured.text[:-1].split("\n")
            assert begin.endswith(": first") and len(rest) == 2 and all(line.startswith("    ") for line in rest)


def test_an_exception_is_one_line_of_json(capture: Callable[..., Captured]) -> None:
    captured = capture()
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logged(captured).exception("it failed")
    (line,) = captured.lines
    assert line["message"] == "it failed" and line["level"] == "error"
    first, *_, last = line["exception"].split("\n")
    assert first == "Traceback (most recent call last):" and last.endswith("\\u202e")
    assert "ValueError: gpt" in line["exception"]
    assert all(part.isprintable() for part in line["exception"].split("\n"))


def test_an_exception_in_the_console_does_not_look_like_lines_of_the_log(capture: Callable[..., Captured]) -> None:
    captured = capture("console")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logged(captured).exception("it failed")
    _, *rest = captured.text.splitlines()
    assert rest and all(line.startswith("    ") for line in rest)


def test_a_huge_exception(capture: Callable[..., Captured]) -> None:
    """moby's copier cuts lines at 16 KB, and what is cut is no JSON."""
    captured = capture()
    try:
        raise ValueError("x" * 10_000_000)
    except ValueError:
        logged(captured).exception("y" * 10_000_000)
    assert MAX_EXCEPTION < len(captured.text) < 16_384
    assert captured.lines


@pytest.mark.parametrize("number", [5, 10, 15, 20, 25, 30, 40, 50, 60])
def test_levels(number: int, capture: Callable[..., Captured]) -> None:
    """docs.python.org/3/library/logging, logging levels; those between are rounded down."""
    captured = capture()
    logged(captured).log(number, "x")
    known = {10: "debug", 20: "info", 30: "warning", 40: "error", 50: "critical"}
    assert captured.lines[0]["level"] == known[min(max(number // 10 * 10, 10), 50)]
    assert set(known.values()) == set(get_args(LogLevel))


def test_arguments_that_do_not_fit(capture: Callable[..., Captured], capfd: pytest.CaptureFixture[str]) -> None:
    class Unspeakable:
        def __str__(self) -> str:
            raise ValueError

    captured = capture()
    logged(captured).info("%d", "x")
    logged(captured).info(Unspeakable())
    assert [line["message"] for line in captured.lines] == [
        "%d (which cannot be shown with its arguments)",
        "Unspeakable (which cannot be shown with its arguments)",
    ]
    assert capfd.readouterr().err == ""


def test_where_it_was_logged(capture: Callable[..., Captured]) -> None:
    captured = capture()
    logged(captured).info("x", stack_info=True)
    assert "test_where_it_was_logged" in captured.lines[0]["exception"]


# ---- events ----


def begun(**given: Any) -> Interception:
    fields: dict[str, Any] = {
        "id": "i1",
        "initiator_id": "alice",
        "provider": "openai",
        "provider_name": "vllm",
        "model": "m-1",
        "started_at": NOW,
        "route": "/v1/responses",
        "streaming": True,
        "client": "codex",
        "client_session_id": "s-1",
        "user_agent": "agent",
        "credential_hint": "…abcd",
    }
    return Interception(**(fields | given))


def ended(**given: Any) -> InterceptionEnded:
    fields: dict[str, Any] = {"interception_id": "i1", "ended_at": NOW + timedelta(seconds=1.5), "status": "completed"}
    return InterceptionEnded(**(fields | given))


def tokens(**counts: Any) -> TokenUsage:
    return TokenUsage(id="t", interception_id="i1", created_at=NOW, completeness="complete", **counts)


def call(hop: int, attempt: int, interception: str = "i1") -> CallBegan:
    return CallBegan(interception, "vllm", "/v1/responses", "m-1", "http://h/v1/responses", hop, attempt)


def tool(*, injected: bool) -> ToolUsage:
    return ToolUsage(
        id="u", interception_id="i1", created_at=NOW, tool="secret-tool", input="secret-input", injected=injected
    )


async def told(captured: Captured, *events: Event, interceptions: bool = True) -> list[dict[str, Any]]:
    """The lines about events, all of which come in one turn of the event loop."""
    observer = EventLog(captured.log, interceptions=interceptions)
    for event in events:
        observer(event)
    assert not observer._open, "nothing is kept of what has ended"
    await asyncio.sleep(0)
    return captured.lines


STARTED = {
    "time": "2026-11-22T08:30:00.123456Z",
    "level": "info",
    "logger": "aibridge.events",
    "message": "interception started",
    "interception_id": "i1",
    "actor": "alice",
    "provider": "vllm",
    "model": "m-1",
    "route": "/v1/responses",
    "streaming": True,
    "client": "codex",
    "session": "s-1",
}
ENDED = STARTED | {"time": "2026-11-22T08:30:01.623456Z", "message": "interception ended", "duration_ms": 1500.0}
NOTHING_CALLED = {"hops": 0, "attempts": 0, "injected_tool_calls": 0, "other_tool_calls": 0}


async def test_every_field_of_an_interception(capture: Callable[..., Captured]) -> None:
    start, end = await told(
        capture(),
        begun(),
        call(1, 1),
        PromptUsage(id="p", interception_id="i1", created_at=NOW, prompt="secret-prompt"),
        tokens(input_tokens=3, output_tokens=4, cache_read_input_tokens=1),
        tool(injected=True),
        tool(injected=True),
        tool(injected=False),
        call(2, 1),
        call(2, 2),
        tokens(input_tokens=0, output_tokens=5, cache_write_input_tokens=2),
        Committed("i1", 0.0123456),
        ended(status="failed", http_status=502, error="it broke", time_to_first_byte_ms=12.5),
    )
    assert start == STARTED
    assert end == ENDED | {
        "level": "warning",
        "status": "failed",
        "http_status": 502,
        "error": "it broke",
        "time_to_first_byte_ms": 12.5,
        "commit_ms": 12.346,
        "input_tokens": 3,
        "output_tokens": 9,
        "cache_read_input_tokens": 1,
        "cache_write_input_tokens": 2,
        "hops": 2,
        "attempts": 3,
        "injected_tool_calls": 2,
        "other_tool_calls": 1,
    }


async def test_what_is_not_known_is_absent(capture: Callable[..., Captured]) -> None:
    start, end = await told(
        capture(),
        begun(model=None, client=None, client_session_id=None),
        tokens(input_tokens=0),
        Committed("i1", 0),
        ended(),
    )
    gone = ("model", "client", "session")
    assert start == {name: value for name, value in STARTED.items() if name not in gone}
    expected = {name: value for name, value in ENDED.items() if name not in gone}
    assert end == expected | NOTHING_CALLED | {"status": "completed", "input_tokens": 0, "commit_ms": 0}


async def test_what_others_are_told(capture: Callable[..., Captured]) -> None:
    """Nothing: a call on a passthrough route, a record that is lost, a request that was passed through."""
    assert not await told(capture(), call(1, 1, ""), RecordLost("", ""), PassedThrough("p", "/r", "GET", 200))


@pytest.mark.parametrize(
    ("status", "level"),
    [("completed", "info"), ("client_disconnected", "info"), ("failed", "warning"), ("interrupted", "warning")],
)
async def test_levels_of_ends(status: Any, level: str, capture: Callable[..., Captured]) -> None:
    _, end = await told(capture(), begun(), Committed("i1", 0), ended(status=status))
    assert (end["status"], end["level"]) == (status, level)


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("invalid_request_error: you said 'my salary is 42'", "invalid_request_error"),
        ("error: my salary is 42", "error"),
        ("The provider could not be reached: Connection refused.", None),
    ],
)
async def test_errors_of_providers_may_quote_what_they_were_sent(
    capture: Callable[..., Captured], error: str, code: str | None, *, content: bool
) -> None:
    """Issue 5: no content by default. Our own errors quote nothing."""
    captured = capture()
    observer = EventLog(captured.log, content=content)
    for event in (begun(), Committed("i1", 0), ended(status="failed", error=error)):
        observer(event)
    await asyncio.sleep(0)
    assert captured.lines[-1]["error"] == (error if content or code is None else code)


async def test_names_from_outside_are_bounded_and_harmless(capture: Callable[..., Captured]) -> None:
    hostile = HOSTILE + "x" * 10_000
    names = {"model": hostile, "client": hostile, "client_session_id": hostile, "initiator_id": hostile}
    for one in FORMATS:
        captured = capture(one)
        observer = EventLog(captured.log)
        for event in (
            begun(**names),
            Committed("i1", 0),
            ended(error=hostile),
            Refused("p", hostile, "rate", hostile, hostile),
            BreakerChanged("p", "/r", hostile, "open"),
        ):
            observer(event)
        await asyncio.sleep(0)
        lines = captured.text.split("\n")[:-1]
        assert len(lines) == 4 and all(line.isprintable() and len(line) < 4096 for line in lines)


async def test_an_end_that_was_not_committed(capture: Callable[..., Captured]) -> None:
    _, end = await told(capture(), begun(), ended())
    assert end == ENDED | NOTHING_CALLED | {"status": "completed"}


async def test_incidents(capture: Callable[..., Captured]) -> None:
    lines = await told(
        capture(worker=4),
        Retried("i1", "vllm", "503", 0.25),
        Refused("vllm", "alice", "actor_concurrency", "10.0.0.7", "You have too many."),
        BreakerChanged("vllm", "/v1/responses", "m-1", "open"),
        BreakerChanged("vllm", "/v1/responses", None, "closed"),
        interceptions=False,
    )
    for line in lines:
        assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
        assert (line.pop("logger"), line.pop("worker"), line.pop("provider")) == ("aibridge.events", 4, "vllm")
    retried = {"message": "a call of a provider is tried again", "interception_id": "i1", "reason": "503", "delay_ms": 250.0}
    refused = {"message": "a request is refused", "actor": "alice", "reason": "actor_concurrency"}
    changed = {"message": "a circuit breaker has changed", "route": "/v1/responses"}
    assert lines == [
        {"level": "warning", **retried},
        {"level": "warning", **refused, "peer": "10.0.0.7", "detail": "You have too many.", "count": 1},
        {"level": "warning", **changed, "model": "m-1", "state": "open"},
        {"level": "info", **changed, "state": "closed"},
    ]


def refusal(actor: str = "alice", reason: RefusalReason = "rate", provider: str = "p") -> Refused:
    return Refused(provider, actor, reason, "10.0.0.7", "Why.")


def summary(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in ("level", "provider", "actor", "reason", "count"))


async def test_refusals_over_and_over(capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """Our choice: a line at once, then one line for all that followed, when the time is over and at the end."""
    monkeypatch.setattr(logs, "_REFUSALS_SECONDS", 0.1)
    captured = capture()
    observer = EventLog(captured.log)
    for _ in range(100):
        observer(refusal())
    observer(refusal("bob"))
    observer(refusal("", "identity", ""))
    await asyncio.sleep(0)
    at_once = [("warning", "p", "alice", "rate", 1), ("warning", None, None, "identity", 1)]
    assert [summary(line) for line in captured.lines] == at_once
    async with asyncio.timeout(10):
        while len(captured.lines) < 3:
            await asyncio.sleep(0.01)
    assert [summary(line) for line in captured.lines[2:]] == [("warning", "p", "bob", "rate", 100)]
    async with asyncio.timeout(10):
        while observer._sum_up is not None:
            await asyncio.sleep(0.01)
    observer(refusal("cleo"))
    await asyncio.sleep(0)
    assert summary(captured.lines[3]) == ("warning", "p", "cleo", "rate", 1), "after a quiet time the next one is new"
    observer(refusal("cleo"))
    observer.close()
    await asyncio.sleep(0)
    assert [summary(line) for line in captured.lines[4:]] == [("warning", "p", "cleo", "rate", 1)], "none is forgotten"


async def test_an_upgrade_that_is_refused_is_no_trouble(capture: Callable[..., Captured]) -> None:
    """Codex and Copilot try it first each time, and fall back to HTTP (clients.md 4)."""
    (line,) = await told(capture(), refusal(reason="upgrade"))
    assert line["level"] == "info"


async def test_without_interceptions(capture: Callable[..., Captured]) -> None:
    assert not await told(capture(), begun(), call(1, 1), tokens(), tool(injected=True), ended(), interceptions=False)


async def test_a_higher_level(capture: Callable[..., Captured]) -> None:
    set_level("warning")
    captured = capture()
    assert not await told(captured, begun(), Committed("i1", 0), ended(), BreakerChanged("p", "/r", None, "closed"))
    (line,) = await told(captured, begun(), Committed("i1", 0), ended(status="failed"))
    assert line["message"] == "interception ended"


async def test_one_write_for_what_comes_together(capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = os.write

    def counted(file: int, data: bytes) -> int:
        written.append(data)
        return write(file, data)

    monkeypatch.setattr(os, "write", counted)
    lines = await told(
        capture(), *(event for n in range(3) for event in (begun(id=f"i{n}"), ended(interception_id=f"i{n}")))
    )
    assert len(lines) == 6 and len(written) == 1


def test_without_an_event_loop(capture: Callable[..., Captured]) -> None:
    captured = capture()
    EventLog(captured.log)(begun())
    assert captured.lines == [STARTED]


def test_every_field_is_documented() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", DOCUMENTATION.read_text(), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    for kind in (LogLine, InterceptionLine, IncidentLine):
        assert set(kind.__struct_fields__) <= documented
    for status in ("completed", "failed", "client_disconnected", "interrupted"):
        assert f"`{status}`" in DOCUMENTATION.read_text()


# ---- the set-up ----


def test_what_is_said_at_which_level() -> None:
    def says(name: str, level: int) -> bool:
        return logging.getLogger(name).isEnabledFor(level)

    set_level("debug")
    assert says("aibridge.server", logging.DEBUG) and not says("httpcore", logging.DEBUG), "it tells of headers"
    assert not says("httpx2", logging.INFO) and not says("mcp.client", logging.ERROR)
    set_level("info")
    assert says("aibridge.server", logging.INFO) and not says("aibridge.server", logging.DEBUG)
    set_level("error")
    assert says("aibridge.server", logging.ERROR) and not says("aibridge.server", logging.WARNING)
    assert not says("httpx2", logging.WARNING) and not says("some.library", logging.WARNING)


class Careless:
    def __del__(self) -> None:
        raise ValueError("in a destructor")


def test_whatever_goes_wrong_comes_out_in_the_format(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("in a thread")

    with warnings.catch_warnings(), logging_to_stderr("json", "info", interceptions=True, content=False, worker=7):
        warnings.simplefilter("always")
        warnings.warn("of something", DeprecationWarning, stacklevel=1)
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        Careless()
        sys.excepthook(ValueError, ValueError("at the end"), None)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["worker"] for line in lines] == [7] * 4
    said = [f"{line['logger']} {line['message']} {line.get('exception', '')}" for line in lines]
    for one, pattern in zip(
        said,
        [
            r"py\.warnings .*DeprecationWarning: of something",
            r"aibridge\.logs a thread ends by an exception Traceback.*ValueError: in a thread",
            r"aibridge\.logs .*Careless\.__del__.*ValueError: in a destructor",
            r"aibridge\.logs the process ends by an exception ValueError: at the end",
        ],
        strict=True,
    ):
        assert re.match(pattern, one, re.DOTALL), one


@pytest.mark.parametrize(("opened", "format"), [(os.openpty, "console"), (os.pipe, "json")])
def test_who_reads_says_in_what_format(opened: Callable[[], tuple[int, int]], format: LogFormat) -> None:
    """Our choice: a terminal is for people, anything else for programs."""
    reader, file = opened()
    try:
        Log("auto", file=file).emit(logging.makeLogRecord({"name": "aibridge", "levelno": logging.INFO, "msg": "Hello"}))
        text = os.read(reader, 65536).decode()
    finally:
        os.close(file)
        os.close(reader)
    assert text.startswith('{"time"') == (format == "json") and "Hello" in text
