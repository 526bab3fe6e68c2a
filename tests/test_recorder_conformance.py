"""What every recorder does, ours and a user's own, seen through the ledger that drives it.

Truth: `Recorder` and design.md section 3: five methods, and optionally thoughts; each is done when the record is durable.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aibridge.commands import End
from aibridge.events import Event, RecordsWritten
from aibridge.ledger import Entry, Ledger
from aibridge.recording import MemoryRecorder, Recorder, SqliteRecorder
from aibridge.records import Interception, InterceptionEnded, PromptUsage, Record, TokenUsage, ToolUsage
from aibridge.wire.base import RequestFacts, ResponseFacts, Thought, ToolCall, Usage
from tests.support.provider import WAIT_SECONDS
from tests.support.records import start

Rows = dict[str, list[dict[str, Any]]]

TABLES = ("interceptions", "token_usages", "user_prompts", "tool_usages", "model_thoughts")


class OwnRecorder:
    """The least that a user has to write. It is no context manager and keeps no thoughts."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    async def record_interception(self, record: Interception) -> None:
        self.records.append(record)

    async def record_interception_ended(self, record: InterceptionEnded) -> None:
        self.records.append(record)

    async def record_token_usage(self, record: TokenUsage) -> None:
        self.records.append(record)

    async def record_prompt_usage(self, record: PromptUsage) -> None:
        self.records.append(record)

    async def record_tool_usage(self, record: ToolUsage) -> None:
        self.records.append(record)


@dataclass(frozen=True)
class Subject:
    recorder: Recorder
    rows: Callable[[], Rows]
    keeps_thoughts: bool = True


def as_rows(interceptions: Iterable[Interception], ends: Iterable[InterceptionEnded], *children: Iterable[Record]) -> Rows:
    """What a database would hold."""
    ended = {end.interception_id: end for end in ends}
    first = [{"status": getattr(ended.get(one.id), "status", "in_progress"), **_fields(one)} for one in interceptions]
    return dict(zip(TABLES, [first, *([_fields(one) for one in some] for some in children)], strict=True))


def _fields(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def _read(path: Path) -> Rows:
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        return {
            table: [dict(row) for row in database.execute(f"SELECT * FROM aibridge_{table} ORDER BY rowid")]
            for table in TABLES
        }


@pytest.fixture(params=["memory", "sqlite", "own"])
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        match request.param:
            case "memory":
                memory = MemoryRecorder()
                yield Subject(
                    memory,
                    lambda: as_rows(
                        memory.interceptions,
                        memory.ended,
                        memory.token_usages,
                        memory.prompts,
                        memory.tool_usages,
                        memory.thoughts,
                    ),
                )
            case "sqlite":
                path = tmp_path / "aibridge.db"
                yield Subject(await stack.enter_async_context(SqliteRecorder(path)), lambda: _read(path))
            case _:
                own = OwnRecorder()
                assert not isinstance(own, AbstractAsyncContextManager)
                yield Subject(own, lambda: own_rows(own.records), keeps_thoughts=False)


def own_rows(records: Sequence[Record]) -> Rows:
    return as_rows(
        [one for one in records if isinstance(one, Interception)],
        [one for one in records if isinstance(one, InterceptionEnded)],
        [one for one in records if isinstance(one, TokenUsage)],
        [one for one in records if isinstance(one, PromptUsage)],
        [one for one in records if isinstance(one, ToolUsage)],
        [],
    )


ANSWERED = ResponseFacts(
    response_id="msg_1",
    usage=Usage(5, 61, 0, None, b'{"a":1}'),
    completeness="complete",
    tool_calls=(ToolCall("toolu_1", "Read", "{}"),),
    thoughts=(Thought("thinking", "Hm."),),
)


async def carried_through(entry: Entry, *answers: ResponseFacts) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        await entry.start()
        for answer in answers:
            entry.record(answer)
        await entry.end(End("completed", 200))


def shown(rows: Rows, table: str, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[column] for column in columns) for row in rows[table]]


async def test_a_record_is_there_when_its_method_is_done(subject: Subject) -> None:
    await subject.recorder.record_interception(start())
    assert shown(subject.rows(), "interceptions", "id", "status", "model") == [("i", "in_progress", "claude-opus-5-5")]


async def test_a_whole_interception(subject: Subject) -> None:
    await carried_through(Entry(Ledger(subject.recorder), start(), RequestFacts(prompt="Why?")), ANSWERED)
    rows = subject.rows()
    assert shown(rows, "interceptions", "id", "status", "initiator_id") == [("i", "completed", "ada")]
    counters = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_write_input_tokens")
    assert shown(rows, "token_usages", "interception_id", "provider_response_id", "completeness", *counters) == [
        ("i", "msg_1", "complete", 5, 61, 0, None)
    ]
    assert shown(rows, "user_prompts", "interception_id", "provider_response_id", "prompt") == [("i", "msg_1", "Why?")]
    assert shown(rows, "tool_usages", "tool", "tool_call_id", "input", "injected") == [("Read", "toolu_1", "{}", False)]
    assert shown(rows, "model_thoughts", "content") == ([("Hm.",)] if subject.keeps_thoughts else [])


async def test_records_keep_their_order(subject: Subject) -> None:
    answers = [ResponseFacts(response_id=f"msg_{n}", usage=Usage(n)) for n in range(50)]
    await carried_through(Entry(Ledger(subject.recorder), start(), RequestFacts()), *answers)
    assert shown(subject.rows(), "token_usages", "input_tokens") == [(n,) for n in range(50)]


async def test_interceptions_at_the_same_time(subject: Subject) -> None:
    ledger = Ledger(subject.recorder)
    entries = [Entry(ledger, start(f"i{n}"), RequestFacts(prompt=f"{n}?")) for n in range(100)]
    await asyncio.gather(*(carried_through(entry, ANSWERED) for entry in entries))
    rows = subject.rows()
    assert sorted(shown(rows, "interceptions", "id", "status")) == sorted((f"i{n}", "completed") for n in range(100))
    assert sorted(shown(rows, "user_prompts", "interception_id", "prompt")) == sorted((f"i{n}", f"{n}?") for n in range(100))
    assert len(set(shown(rows, "token_usages", "id"))) == 100


async def test_observers_need_not_know_which_it_is(subject: Subject) -> None:
    """What a recorder tells of its own work comes beside."""
    events: list[Event] = []
    await carried_through(Entry(Ledger(subject.recorder, [events.append]), start(), RequestFacts(prompt="?")), ANSWERED)
    assert [type(event).__name__ for event in events if not isinstance(event, RecordsWritten)] == [
        *("Interception", "PromptUsage", "TokenUsage", "ToolUsage", "ModelThought", "Committed", "InterceptionEnded")
    ]
