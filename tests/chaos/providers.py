"""Providers that break off or stall, in every phase of an exchange."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from .asking import QUESTION, Stage, ask, observe, observed, staged
from .clients import BROKEN_OFF, COMPLETE, ERROR_EVENT, refused
from .rawprovider import Answer, Ending, Read, Script, Step
from .scenario import Chapter, Observed, Outcome, Scale, Scenario

IDLE_SECONDS: Final = "2"

Written = Callable[[Answer], bytes]
Phase = tuple[Read | None, Written | None]
"""How far the provider gets: what it has read, what it has written."""

NO_USAGE: Final = "`failed`, no usage"
PARTIAL: Final = "`failed`, usage partial"
KNOWN: Final = "`completed`, usage complete"

UNANSWERED: Final = Outcome(refused(502), NO_USAGE)
UNFINISHED: Final = Outcome(f"streams: {ERROR_EVENT}; whole: {BROKEN_OFF}", PARTIAL)
TIMED_OUT: Final = Outcome(refused(504), PARTIAL)  # it may have begun, and bill it
ALL_SAID: Final = Outcome(
    f"streams: {COMPLETE}; whole: {BROKEN_OFF}", f"streams: {KNOWN}; whole: {PARTIAL}"
)  # the last event has come; of a whole body nobody knows whether it has


def _begun(answer: Answer) -> bytes:
    return answer.head + b"".join(answer.chunks[:2])


BEFORE_THE_ANSWER: Final[dict[str, Phase]] = {
    "after accepting the connection": (None, None),
    "after the request's head": (Read.HEAD, None),
    "in the middle of the request's body": (Read.PART, None),
    "before the status line": (Read.ALL, None),
    "in the middle of the status line": (Read.ALL, lambda answer: answer.head[:11]),
    "in the middle of the headers": (Read.ALL, lambda answer: answer.head[:40]),
}
WITHIN_THE_ANSWER: Final[dict[str, Phase]] = {
    "after the headers": (Read.ALL, lambda answer: answer.head),
    "between two events": (Read.ALL, _begun),
    "in the middle of a chunk's header": (Read.ALL, lambda answer: _begun(answer) + answer.chunks[2][:1]),
    "in the middle of an event": (Read.ALL, lambda answer: _begun(answer) + answer.chunks[2][:20]),
    "before the last event": (Read.ALL, lambda answer: answer.head + b"".join(answer.chunks[:-1])),
}
LARGE: Final = "word " * 600_000  # more than sockets hold, so the gateway still sends when the provider has had enough


def script_of(phase: Phase, ending: Ending) -> Script:
    """Get as far as that, and no further."""
    reading, written = phase

    def script(answer: Callable[[], Answer]) -> Iterator[Step]:
        if reading is not None:
            yield reading
        if written is not None:
            yield written(answer())
        yield ending

    return script


async def _breaks_off(phase: Phase, stage: Stage, _: Scale) -> Observed:
    prompt = LARGE if phase[0] is Read.PART else QUESTION
    return await observe(stage, script_of(phase, Ending.FIN), script_of(phase, Ending.RESET), prompt=prompt)


async def _stalls(phase: Phase, stage: Stage, _: Scale) -> Observed:
    prompt = LARGE if phase[0] is Read.PART else QUESTION
    return await observe(stage, script_of(phase, Ending.STALL), prompt=prompt, sdks=False)


async def _refuses(stage: Stage, _: Scale) -> Observed:
    """Nobody listens: the provider's own address, while it is not there."""
    with stage.provider.away():
        tried = await ask(stage)
    return await observed(stage, tried)


BREAKING_OFF: Final = Chapter(
    "A provider breaks off",
    "By FIN, as when a process dies, and by RST, as when a machine does; what they cost is the same.",
    staged,
    [
        Scenario("before accepting the connection", UNANSWERED, _refuses),
        *(Scenario(when, UNANSWERED, partial(_breaks_off, phase)) for when, phase in BEFORE_THE_ANSWER.items()),
        *(Scenario(when, UNFINISHED, partial(_breaks_off, phase)) for when, phase in WITHIN_THE_ANSWER.items()),
        Scenario(
            "after the last event, before the last chunk",
            ALL_SAID,
            partial(_breaks_off, (Read.ALL, lambda answer: answer.head + b"".join(answer.chunks))),
        ),
    ],
)

_STALLING: Final = {
    "after accepting the connection": TIMED_OUT,
    "in the middle of the request's body": TIMED_OUT,
    "in the middle of the headers": TIMED_OUT,
    "after the headers": UNFINISHED,
    "between two events": UNFINISHED,
    "in the middle of a chunk's header": UNFINISHED,
    "in the middle of an event": UNFINISHED,
}

STALLING: Final = Chapter(
    "A provider stalls",
    "It says and takes nothing more, and keeps the connection. `upstream.first_byte_timeout` and"
    " `upstream.idle_timeout` end that: here after two seconds.",
    lambda: staged(AIBRIDGE_UPSTREAM__IDLE_TIMEOUT=IDLE_SECONDS, AIBRIDGE_UPSTREAM__FIRST_BYTE_TIMEOUT=IDLE_SECONDS),
    [
        Scenario(when, promised, partial(_stalls, (BEFORE_THE_ANSWER | WITHIN_THE_ANSWER)[when]))
        for when, promised in _STALLING.items()
    ],
)
