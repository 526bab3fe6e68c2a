"""One client request and its upstream turns: the engine, without I/O.

`converse` is a generator. It yields *commands* (`aibridge.commands`) and is sent their results, so it reads from top to
bottom like blocking code, runs without an event loop in tests, and leaves clocks, sockets and ids to the shell
(`aibridge.relay`):

    conversation = converse(request)
    command = next(conversation)             # Send(request)
    command = conversation.send(head)        # Respond(...), then Receive() ...
    command = conversation.throw(error)      # what went wrong while carrying out the last command

What may be thrown in: `UpstreamError` at Send and Receive, `ClientDisconnected` and `Interrupted` at Send, Receive, Respond,
Relay, CallTools and Remember, `RecordingFailed` at End. Nothing else, and nothing comes out.

With tools of the bridge's own in the request there may be several turns: what the model calls of them is run, its turn and
the results are appended to the request, and the client sees the answers as one (`aibridge.merger`).

*Durable before done*: the bytes that make a response look complete to the client (its last event, the end of a declared
length, the end of the body) are yielded after `End`, and the shell carries out `End` by waiting until the records are
committed. If they cannot be, the client is told so in place of an end.
"""

from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import msgspec

from aibridge.commands import (
    Abort,
    Answers,
    CallTools,
    Command,
    Conversation,
    End,
    Receive,
    Record,
    Relay,
    Remember,
    Respond,
    Send,
)
from aibridge.errors import (
    SHUTDOWN,
    BridgeError,
    ClientDisconnected,
    Interrupted,
    RecordingFailed,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
    error_body,
)
from aibridge.merger import Loop, LoopMerger, Merger, VerbatimMerger
from aibridge.records import Status
from aibridge.wire.base import Request, ResponseFacts, Usage
from aibridge.wire.observer import ResponseHead
from aibridge.wire.turns import Answered, Turn

_LIMIT: Final = "The model may not call any more tools in this turn, so the call was not made."
# The provider may have begun, and bill it: the figures are not known, but it is known that there are some.
_NOBODY_KNOWS: Final = ResponseFacts(usage=Usage(), completeness="partial")


def converse(request: Request, loop: Loop | None = None) -> Conversation:
    """Carry one client request through; `loop` where tools were injected into it. See the module's docstring."""
    sent = request.sent
    steps, request = _turns(request, sent, loop), sent
    merger, turns, end = yield from steps
    if loop is not None and turns:
        with suppress(ClientDisconnected, Interrupted):  # it is being kept, whoever waits
            yield Remember(request.format.turns.memory(loop.draft, loop.toolset, turns), loop.toolset)
    if merger.failure is not None and not merger.started and end.status != "client_disconnected":
        end = msgspec.structs.replace(end, http_status=merger.failure.status)  # which is what the client gets
    merger.failure = (yield from _end(end)) or merger.failure
    if end.status == "client_disconnected":
        return
    if merger.failure is not None:
        yield from _break_off(merger) if merger.started else _refuse(request, merger.failure)
    elif merger.started:
        yield from _finish(merger)
    else:
        yield from _last_words(*merger.whole())


def _turns(
    request: Request, sent: Request, loop: Loop | None
) -> Generator[Command, Any, tuple[Merger, list[Answered], End]]:
    """Ask the provider, and again as long as it calls tools of ours only. Answers with what there is to finish, the turns
    that are to be remembered, and how the interception ends. `sent` is what is to be known of the request later.
    """
    merger: Merger = VerbatimMerger(sent) if loop is None else LoopMerger(sent, loop)
    turns: list[Answered] = []
    last = loop is None or loop.max_turns == 1
    while True:
        steps = _ask(request, sent, merger)
        if loop is None:
            request = sent
        merger, end = yield from steps
        if loop is None or not isinstance(merger, LoopMerger) or end.status != "completed":
            break
        turn = merger.turn()
        try:
            answers = yield from _answer(turn, refused=last)
        except (ClientDisconnected, Interrupted) as event:
            merger.failure = SHUTDOWN
            end = End(_status_of(event), merger.status)
            break
        turns.append(Answered(turn, answers.outcomes))
        if last or not turn.calls or turn.awaits_client:
            break
        last = answers.out_of_time or len(turns) + 1 >= loop.max_turns
        request = msgspec.structs.replace(request, body=request.format.turns.with_turn(request.body, turns[-1], last=last))
    if not turns and merger.started and isinstance(merger, LoopMerger):
        turns.append(Answered(merger.turn()))  # what the client has of it is bound to the tools that were offered
    return merger, turns, end


def _ask(request: Request, sent: Request, merger: Merger) -> Generator[Command, Any, tuple[Merger, End]]:
    """Send a request, relay the response up to its end, and record it. Answers with what the response was presented by, and
    how the interception ends if this is all of it.
    """
    try:
        head = yield Send(request)
    except UpstreamError as error:
        merger.failure = error
        began = isinstance(error, UpstreamTimeout) and not isinstance(error, Unreachable)
        yield Record(_NOBODY_KNOWS if began else ResponseFacts())
        return merger, End("failed", merger.status, error.message)
    except (ClientDisconnected, Interrupted) as event:
        merger.failure = SHUTDOWN
        yield Record(ResponseFacts() if event.refused else _NOBODY_KNOWS)
        return merger, End(_status_of(event), merger.status)
    request = sent
    if not (head.ok or merger.started):  # an error goes to the client as it is
        merger = VerbatimMerger(request)
    end = yield from _relay(merger, head)
    yield Record(merger.facts)
    return merger, end


def _relay(merger: Merger, head: ResponseHead) -> Generator[Command, Any, End]:
    """Relay a response up to its end, which is held back."""
    listening = True
    try:
        if (beginning := merger.begin(head)) is not None:
            yield beginning
        while not merger.bodiless and (chunk := (yield Receive())):
            listening = yield Relay(merger.feed(chunk))
            if merger.finished:
                break
        merger.end()
    except UpstreamError as error:
        merger.failure = error
    except (ClientDisconnected, Interrupted) as event:
        merger.failure = SHUTDOWN
        return End(_status_of(event), merger.status)
    if not listening:
        return End("client_disconnected", merger.status)
    if merger.error is not None:
        return End("failed", merger.status, merger.error)
    return End("completed", merger.status)


def _answer(turn: Turn, *, refused: bool) -> Generator[Command, Any, Answers]:
    """Have the calls of a turn run, or only recorded where none must be made any more."""
    if not turn.calls:
        return Answers(())
    if refused:
        yield CallTools(turn.response_id, tuple(replace(call, refusal=_LIMIT) for call in turn.calls))
        return Answers(())
    answers: Answers = yield CallTools(turn.response_id, turn.calls)
    return answers


def _finish(merger: Merger) -> Conversation:
    """Let go of what ends the response, and pass on what follows the last event until the provider closes."""
    try:
        yield Relay(merger.finish())
    except (ClientDisconnected, Interrupted):  # without its end the response must not look complete
        yield Abort()
        return
    with suppress(UpstreamError, ClientDisconnected, Interrupted):  # it was complete, and is recorded as such
        while chunk := (yield Receive()):
            yield Relay(merger.feed(chunk))
        if rest := merger.rest():
            yield Relay(rest)
    if merger.owes:
        yield Abort()


def _end(end: End) -> Generator[Command, Any, RecordingFailed | None]:
    try:
        yield end
    except RecordingFailed as error:
        return error
    return None


def _status_of(event: ClientDisconnected | Interrupted) -> Status:
    return "interrupted" if isinstance(event, Interrupted) else "client_disconnected"


def _refuse(request: Request, error: BridgeError) -> Conversation:
    """Answer with an error of our own, before anything was relayed."""
    body = error_body(request.format.kind, error.status, error.message)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *error.headers]
    yield from _last_words(Respond(error.status, headers), Relay(body))


def _break_off(merger: Merger) -> Conversation:
    """End a response that is not complete: in the protocol's own way where one can be, never silently (failures.md 18)."""
    event = merger.error_event()
    if event is None:
        yield Abort()
    else:
        yield from _last_words(Relay(event))


def _last_words(*commands: Command) -> Conversation:
    try:
        for command in commands:  # noqa: UP028  a tuple takes no answers
            yield command
    except (ClientDisconnected, Interrupted):
        yield Abort()
