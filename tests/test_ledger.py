"""An entry of the ledger: from facts to records, in order, for the recorder and the observers alike.

Truth: design.md sections 2 and 3; `Recorder` for what a user's own class may do. The marker `[credential]` is our choice.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import pytest
import uuid_utils

from aibridge.commands import End
from aibridge.errors import RecordingFailed
from aibridge.events import Committed, Event, PassedThrough, RecordLost, RecordsReplayed, RecordsWritten, notify
from aibridge.ledger import Entry, Ledger, WhenUnrecordable, new_id
from aibridge.recording import MemoryRecorder
from aibridge.recording.base import Report
from aibridge.records import (
    Interception,
    InterceptionEnded,
    ModelThought,
    PromptUsage,
    Record,
    TokenUsage,
    ToolUsage,
)
from aibridge.wire.base import RequestFacts, ResponseFacts, Thought, ToolCall, Usage
from tests.support.provider import WAIT_SECONDS
from tests.support.records import NOON, start

ASKED = RequestFacts(model="claude-opus-5-5", stream=True, prompt="Why?")
ANSWERED = ResponseFacts(
    response_id="msg_1",
    model="claude-opus-5-5-20260901",
    usage=Usage(5, 61, 0, None, b'{"input_tokens":5}'),
    completeness="complete",
    tool_calls=(ToolCall("toolu_1", "Read", '{"a" :1}', {"run_by": "provider"}), ToolCall("toolu_2", "Bash", None)),
    thoughts=(Thought("thinking", "Hm.", {"index": 0}), Thought("commentary", "So.")),
    stop_reason="tool_use",
    notes=("an event was not read",),
)


class OwnRecorder:
    """What a user would write: the five methods, and no more. It takes a turn of the loop for each record."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    async def record_interception(self, record: Interception) -> None:
        await self.keep(record)

    async def record_interception_ended(self, record: InterceptionEnded) -> None:
        await self.keep(record)

    async def record_token_usage(self, record: TokenUsage) -> None:
        await self.keep(record)

    async def record_prompt_usage(self, record: PromptUsage) -> None:
        await self.keep(record)

    async def record_tool_usage(self, record: ToolUsage) -> None:
        await self.keep(record)

    async def keep(self, record: Record) -> None:
        await asyncio.sleep(0)
        self.records.append(record)


class Failing(OwnRecorder):
    """Fails for records of some types."""

    def __init__(self, *kinds: type[Record]) -> None:
        super().__init__()
        self.kinds = kinds

    async def keep(self, record: Record) -> None:
        await super().keep(record)
        if isinstance(record, self.kinds):
            self.records.pop()
            raise OSError("disk full while writing 'a secret prompt'")


class Gated(OwnRecorder):
    """Keeps a record when the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def keep(self, record: Record) -> None:
        await self.gate.wait()
        await super().keep(record)


class Promising:
    """Answers with futures, as `SqliteRecorder` does. The test completes them, or opens the gate."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.futures: list[asyncio.Future[None]] = []
        self.is_open = False

    def keep(self, record: Record) -> asyncio.Future[None]:
        self.records.append(record)
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.futures.append(future)
        if self.is_open:  # never at once: a database takes its time
            loop.call_soon(settle, future)
        return future

    record_interception = record_interception_ended = keep
    record_token_usage = record_prompt_usage = record_tool_usage = keep


def settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def open_gate(recorder: Gated | Promising) -> None:
    if isinstance(recorder, Gated):
        recorder.gate.set()
        return
    recorder.is_open = True
    for future in recorder.futures:
        settle(future)


def close_gate(recorder: Gated | Promising) -> None:
    if isinstance(recorder, Gated):
        recorder.gate.clear()
    else:
        recorder.is_open = False


def entry(recorder: Any, events: list[Event], policy: WhenUnrecordable = "refuse", **about: Any) -> Entry:
    return Entry(Ledger(recorder, [events.append], policy), start(), about.pop("request", ASKED), **about)


async def carried_through(entry: Entry, *answers: ResponseFacts, end: End | None = None) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        await entry.start()
        for answer in answers or (ANSWERED,):
            entry.record(answer)
        await entry.end(end or End("completed", 200))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0)


def kinds(records: Iterable[object]) -> list[type]:
    return [type(record) for record in records]


WHOLE = [Interception, PromptUsage, TokenUsage, ToolUsage, ToolUsage, ModelThought, ModelThought, InterceptionEnded]
WITHOUT_THOUGHTS = [kind for kind in WHOLE if kind is not ModelThought]
TOLD = [*WHOLE[:-1], Committed, InterceptionEnded]  # when all of it is durable

# ---- facts to records ----


async def test_facts_become_records() -> None:
    recorder = MemoryRecorder()
    await carried_through(entry(recorder, []))
    assert recorder.interceptions == [start()]
    (prompt,) = recorder.prompts
    assert (prompt.prompt, prompt.provider_response_id, prompt.interception_id) == ("Why?", "msg_1", "i")
    (usage,) = recorder.token_usages
    assert (usage.input_tokens, usage.output_tokens, usage.cache_read_input_tokens) == (5, 61, 0)
    assert usage.cache_write_input_tokens is None
    assert (usage.completeness, usage.provider_response_id) == ("complete", "msg_1")
    assert {**usage.metadata, "usage": bytes(usage.metadata["usage"])} == {
        "model": "claude-opus-5-5-20260901",
        "stop_reason": "tool_use",
        "notes": ("an event was not read",),
        "usage": b'{"input_tokens":5}',
    }
    assert [(tool.tool, tool.input, tool.tool_call_id, tool.metadata, tool.injected) for tool in recorder.tool_usages] == [
        ("Read", '{"a" :1}', "toolu_1", {"run_by": "provider"}, False),
        ("Bash", None, "toolu_2", {}, False),
    ]
    assert [(thought.content, thought.metadata) for thought in recorder.thoughts] == [
        ("Hm.", {"source": "thinking", "index": 0, "provider_response_id": "msg_1"}),
        ("So.", {"source": "commentary", "provider_response_id": "msg_1"}),
    ]
    (end,) = recorder.ended
    assert (end.interception_id, end.status, end.http_status, end.error) == ("i", "completed", 200, None)
    assert end.time_to_first_byte_ms is None
    assert NOON < prompt.created_at <= usage.created_at <= end.ended_at < NOON + timedelta(seconds=WAIT_SECONDS)


async def test_facts_that_are_not_there_make_no_records() -> None:
    recorder = MemoryRecorder()
    await carried_through(entry(recorder, [], request=RequestFacts()), ResponseFacts(thoughts=(Thought("thinking", ""),)))
    assert (recorder.prompts, recorder.token_usages, recorder.tool_usages) == ([], [], [])
    assert recorder.thoughts[0].metadata == {"source": "thinking"}


async def test_a_usage_that_was_never_reported_is_a_row_of_nones() -> None:
    recorder = MemoryRecorder()
    await carried_through(entry(recorder, []), ResponseFacts(usage=Usage(), completeness="partial"))
    (usage,) = recorder.token_usages
    assert (usage.input_tokens, usage.output_tokens, usage.completeness, usage.metadata) == (None, None, "partial", {})


async def test_the_prompt_belongs_to_the_first_response() -> None:
    recorder = MemoryRecorder()
    await carried_through(entry(recorder, []), ANSWERED, ResponseFacts(response_id="msg_2", usage=Usage()))
    assert [prompt.provider_response_id for prompt in recorder.prompts] == ["msg_1"]
    assert [usage.provider_response_id for usage in recorder.token_usages] == ["msg_1", "msg_2"]


async def test_a_usage_object_that_is_not_unicode_is_kept_as_far_as_it_is() -> None:
    recorder = MemoryRecorder()
    await carried_through(entry(recorder, []), ResponseFacts(usage=Usage(raw=b'{"tier":"\xff\xc3\xa9"}')))
    assert bytes(recorder.token_usages[0].metadata["usage"]).decode() == '{"tier":"\N{REPLACEMENT CHARACTER}é"}'


async def test_the_first_byte_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.25, 100.75])
    monkeypatch.setattr("aibridge.ledger.time.monotonic", lambda: next(clock, 999.0))
    recorder = MemoryRecorder()
    this = entry(recorder, [])
    this.first_byte()
    this.first_byte()
    # Not carried_through: its timeout would ask the same clock.
    await this.start()
    await this.end(End("completed"))
    assert recorder.ended[0].time_to_first_byte_ms == 250.0


async def test_times_are_the_start_and_what_has_passed_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock may be set meanwhile, by a day or by a second: nothing ends before it began (issue 5, clock jumps)."""
    now = 100.0
    monkeypatch.setattr("aibridge.ledger.time.monotonic", lambda: now)
    recorder = MemoryRecorder()
    this = entry(recorder, [])
    await this.start()
    now = 100.5
    this.record(ANSWERED)
    now = 107.25
    await this.end(End("completed"))
    (usage,), (end,) = recorder.token_usages, recorder.ended
    assert usage.created_at == NOON + timedelta(seconds=0.5)
    assert end.ended_at == NOON + timedelta(seconds=7.25)


async def test_secrets_that_a_provider_quotes_are_taken_out() -> None:
    recorder = MemoryRecorder()
    secrets = ["sk-1234567", "", "tok-99"]
    quoted = "Incorrect API key: sk-1234567. Bearer sk-1234567 or tok-99 " + "sk-1234567" * 5000
    await carried_through(entry(recorder, [], secrets=lambda: secrets), end=End("failed", 401, quoted))
    error = recorder.ended[0].error
    assert error is not None and len(error) == 2000
    assert error.startswith("Incorrect API key: [credential]. Bearer [credential] or [credential] [credential]")
    assert "sk-1" not in error and "tok-99" not in error


async def test_secrets_that_a_provider_quotes_in_another_form_are_taken_out() -> None:
    """In a URL, in JSON, in JSON within JSON; and one that begins with another."""
    key = 'abcd/EFGH+ijkl"mnop'
    for quoted in (quote(key, safe=""), json.dumps(key), json.dumps(json.dumps(key)), key + "-more"):
        recorder = MemoryRecorder()
        secrets = [key, key + "-more"]
        this = entry(recorder, [], secrets=lambda secrets=secrets: secrets)
        await carried_through(this, end=End("failed", 401, f"bad key {quoted}"))
        (end,) = recorder.ended
        assert end.error is not None and "[credential]" in end.error
        assert not any(part in end.error for part in ("abcd", "EFGH", "ijkl", "mnop", "more"))


def test_ids_are_version_7_and_sort_by_time() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000 and all(uuid_utils.UUID(one).version == 7 for one in ids)
    assert all(earlier < later for earlier, later in pairwise(ids))


# ---- recorder and observers ----


async def test_recorder_and_observers_see_the_same() -> None:
    recorder, events = OwnRecorder(), list[Event]()
    await carried_through(entry(recorder, events))
    assert kinds(events) == TOLD
    assert kinds(recorder.records) == WITHOUT_THOUGHTS  # it has no method for them
    theirs = [event for event in events if not isinstance(event, ModelThought | Committed)]
    assert all(mine is other for mine, other in zip(recorder.records, theirs, strict=True))


async def test_a_recorder_gets_one_record_of_an_interception_at_a_time() -> None:
    class Watching(OwnRecorder):
        under_way = most = 0

        async def keep(self, record: Record) -> None:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await super().keep(record)
            self.under_way -= 1

    recorder = Watching()
    await carried_through(entry(recorder, []))
    assert recorder.most == 1


async def test_any_awaitable_will_do() -> None:
    class Later:
        def __init__(self, done: Callable[[], Awaitable[None]]) -> None:
            self.done = done

        def __await__(self) -> Any:
            return self.done().__await__()

    class Custom(OwnRecorder):
        def record_token_usage(self, record: TokenUsage) -> Any:
            return Later(lambda: self.keep(record))

    recorder = Custom()
    await carried_through(entry(recorder, []))
    assert kinds(recorder.records) == WITHOUT_THOUGHTS


async def test_an_observer_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    events: list[Event] = []
    recorder = MemoryRecorder()

    def broken(event: Event) -> None:
        raise ZeroDivisionError

    this = Entry(Ledger(recorder, [broken, events.append]), start(), ASKED)
    await carried_through(this)
    assert kinds(events) == TOLD and len(recorder.ended) == 1
    assert [record.message for record in caplog.records] == ["an observer failed"] * len(TOLD)


def test_other_events_reach_the_observers_too() -> None:
    events: list[Event] = []
    notify([events.append], PassedThrough("main", "/v1/models", "GET", 200))
    assert events == [PassedThrough("main", "/v1/models", "GET", 200)]


# ---- what is lost ----


async def test_a_start_that_cannot_be_recorded_is_refused_and_never_took_place() -> None:
    events: list[Event] = []
    with pytest.raises(RecordingFailed, match="cannot be recorded") as refused:
        await entry(Failing(Interception), events).start()
    assert refused.value.headers == ((b"retry-after", b"5"),), "the recorder tries the database again each second"
    assert events == [RecordLost("i", "Interception")]


class Full(OwnRecorder):
    failing = True


async def test_nothing_begins_while_records_are_lost() -> None:
    """The start alone might find room, and the provider would be asked, and paid, for a response that nobody gets."""
    events: list[Event] = []
    recorder = Full()
    with pytest.raises(RecordingFailed, match="not served"):
        await entry(recorder, events).start()
    assert recorder.records == events == []
    await carried_through(entry(recorder, events, "continue"))
    assert kinds(events) == TOLD


async def test_carrying_on_counts_what_is_lost() -> None:
    events: list[Event] = []
    recorder = Failing(Interception, TokenUsage)
    await carried_through(entry(recorder, events, "continue"))
    assert kinds(recorder.records) == [PromptUsage, ToolUsage, ToolUsage, InterceptionEnded]
    assert kinds(event for event in events if not isinstance(event, RecordLost)) == WHOLE
    assert [event for event in events if isinstance(event, RecordLost)] == [
        RecordLost("i", "Interception"),
        RecordLost("i", "TokenUsage"),
    ]


async def test_an_end_is_refused_when_any_record_was_lost_and_the_others_are_kept() -> None:
    events: list[Event] = []
    recorder = Failing(PromptUsage)
    with pytest.raises(RecordingFailed):
        await carried_through(entry(recorder, events))
    assert kinds(recorder.records) == [Interception, TokenUsage, ToolUsage, ToolUsage, InterceptionEnded]
    assert [event for event in events if isinstance(event, RecordLost)] == [RecordLost("i", "PromptUsage")]
    ended = events[-1]
    assert isinstance(ended, InterceptionEnded) and ended.status == "failed", "for its client it has"
    assert "cannot be recorded" in (ended.error or "") and Committed not in kinds(events)


@pytest.mark.parametrize(
    ("end", "begun", "told"),
    [
        (End("completed", 200), True, ("failed", 200)),  # and is broken off
        (End("completed", 200), False, ("failed", 503)),
        (End("failed", 502, "no route"), False, ("failed", 503)),
        (End("client_disconnected", 200), True, ("client_disconnected", 200)),
    ],
)
async def test_observers_are_told_what_the_client_got(end: End, begun: bool, told: tuple[str, int]) -> None:
    events: list[Event] = []
    this = entry(Failing(InterceptionEnded), events)
    await this.start()
    with pytest.raises(RecordingFailed):
        await this.end(end, begun=begun)
    ended = events[-1]
    assert isinstance(ended, InterceptionEnded) and (ended.status, ended.http_status) == told


async def test_a_recorder_that_fails_at_once_has_lost_the_record() -> None:
    class Broken(OwnRecorder):
        def record_token_usage(self, record: TokenUsage) -> Any:
            raise KeyError("x")

    events: list[Event] = []
    recorder = Broken()
    with pytest.raises(RecordingFailed):
        await carried_through(entry(recorder, events))
    assert RecordLost("i", "TokenUsage") in events
    assert kinds(recorder.records) == [kind for kind in WITHOUT_THOUGHTS if kind is not TokenUsage]


async def test_a_recorder_that_gives_a_record_up_has_lost_it() -> None:
    events: list[Event] = []
    recorder = Promising()
    starting = asyncio.create_task(entry(recorder, events).start())
    await until(lambda: bool(recorder.futures))
    recorder.futures[0].cancel()
    with pytest.raises(RecordingFailed):
        await starting
    assert events == [RecordLost("i", "Interception")]


async def test_the_log_does_not_quote_what_could_not_be_stored(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(RecordingFailed):
        await entry(Failing(Interception), []).start()
    assert [record.getMessage() for record in caplog.records if record.name == "aibridge.ledger"] == [
        "record lost: Interception of interception i: OSError"
    ]
    assert "secret" not in caplog.text


async def test_what_a_recorder_tells_is_told_to_the_observers() -> None:
    class Talkative(OwnRecorder):
        def report_to(self, report: Report) -> None:
            self.tell = report

    events: list[Event] = []
    recorder = Talkative()
    Ledger(recorder, [events.append])
    told: list[Event] = [RecordsWritten(3, 0.01, "spool"), RecordsReplayed(3), RecordLost.of(start("x"))]
    for event in told:
        recorder.tell(event)  # type: ignore[arg-type]
    assert events == told


def test_the_loss_of_a_record() -> None:
    usage = TokenUsage(id="u", interception_id="y", created_at=datetime.now(UTC), completeness="complete")
    lost = [RecordLost.of(record) for record in (start("x"), usage, None)]
    assert lost == [RecordLost("x", "Interception"), RecordLost("y", "TokenUsage"), RecordLost("", "")]


# ---- cancellation ----


@pytest.mark.parametrize("make", [Gated, Promising])
async def test_a_cancelled_end_loses_nothing(make: Callable[[], Gated | Promising]) -> None:
    events: list[Event] = []
    recorder = make()
    this = entry(recorder, events)
    task = asyncio.create_task(carried_through(this))
    open_gate(recorder)
    await until(lambda: bool(events))
    close_gate(recorder)
    await until(lambda: PromptUsage in kinds(events))
    assert InterceptionEnded not in kinds(events), "it has not, as long as that is not durable"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert kinds(events) == WHOLE, "it is told all the same"
    del this, task
    open_gate(recorder)
    await until(lambda: kinds(recorder.records) == WITHOUT_THOUGHTS)
    assert not [event for event in events if isinstance(event, RecordLost)]


async def test_a_loss_is_counted_though_nobody_waits_any_more() -> None:
    events: list[Event] = []
    recorder = Promising()
    task = asyncio.create_task(carried_through(entry(recorder, events)))
    await until(lambda: len(recorder.futures) == 1)
    recorder.futures[0].set_result(None)
    await until(lambda: len(recorder.futures) == len(WITHOUT_THOUGHTS))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(future.cancelled() for future in recorder.futures)
    recorder.futures[2].set_exception(RecordingFailed("full"))
    await until(lambda: RecordLost("i", "TokenUsage") in events)


@pytest.mark.parametrize("make", [Gated, Promising])
async def test_a_cancelled_start_is_closed_as_interrupted(make: Callable[[], Gated | Promising]) -> None:
    events: list[Event] = []
    recorder = make()
    task = asyncio.create_task(entry(recorder, events).start())
    await until(lambda: bool(recorder.futures) if isinstance(recorder, Promising) else True)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events == []
    open_gate(recorder)
    await until(lambda: kinds(recorder.records) == [Interception, InterceptionEnded])
    await until(lambda: kinds(events) == [Interception, Committed, InterceptionEnded])
    end = events[-1]
    assert isinstance(end, InterceptionEnded) and (end.interception_id, end.status) == ("i", "interrupted")


async def test_a_cancelled_start_that_was_not_recorded_needs_no_end() -> None:
    events: list[Event] = []
    recorder = Promising()
    task = asyncio.create_task(entry(recorder, events).start())
    await until(lambda: bool(recorder.futures))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    recorder.futures[0].set_exception(RecordingFailed("full"))
    await until(lambda: bool(events))
    assert events == [RecordLost("i", "Interception")]
    assert len(recorder.records) == 1


class Together(MemoryRecorder):
    """Takes what comes together at once."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[str]] = []

    async def record_together(self, records: Sequence[Record]) -> None:
        self.groups.append([type(record).__name__ for record in records])


class KeepsNoPrompts(Together):
    async def record_prompt_usage(self, record: PromptUsage) -> None:
        """What users ask is nobody's business."""


async def test_what_becomes_known_together_is_recorded_together() -> None:
    recorder = Together()
    entry = Entry(Ledger(recorder), start(), ASKED)
    await entry.start()
    entry.record(ANSWERED)
    await entry.end(End("completed", 200))
    said = ["PromptUsage", "TokenUsage", "ToolUsage", "ToolUsage", "ModelThought", "ModelThought", "InterceptionEnded"]
    assert recorder.groups == [["Interception"], said] and not recorder.interceptions


async def test_a_method_that_somebody_overrides_is_called() -> None:
    """It may be there to keep something out of the ledger."""
    recorder = KeepsNoPrompts()
    entry = Entry(Ledger(recorder), start(), ASKED)
    await entry.start()
    assert recorder.groups == [] and len(recorder.interceptions) == 1
