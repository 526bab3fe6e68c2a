"""Providers that say what is no answer, or say an answer as nobody should."""

import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final

from .asking import Sent, Stage, observe, staged
from .clients import COMPLETE, ERROR_EVENT, VERBATIM, refused
from .providers import ALL_SAID, KNOWN, LARGE, NO_USAGE, PARTIAL, UNANSWERED, UNFINISHED
from .rawprovider import CHUNKED, LAST_CHUNK, Answer, Ending, Read, Script, Step, answer, chunked, head
from .scenario import Chapter, Observed, Outcome, Scale, Scenario

UNKNOWN: Final = "`completed`, usage unknown"
UNHARMED: Final = Outcome(COMPLETE, KNOWN)
UNREAD: Final = Outcome(VERBATIM, UNKNOWN)

PAGE: Final = b"<!doctype html><title>Sign in</title><p>Please sign in to this hotel's network.</p>"
NOISE: Final = random.Random(5).randbytes(5000)
TLS_ALERT: Final = bytes.fromhex("15030100020246")


# ---- what is said ----


def says(*said: Step) -> Script:
    """The same to everybody."""
    return lambda _: [Read.ALL, *said]


def answering(steps: Callable[[Answer], Iterable[Step]]) -> Script:
    """Something made of a good answer."""

    def script(good: Callable[[], Answer]) -> Iterator[Step]:
        yield Read.ALL
        yield from steps(good())

    return script


def page(status: str = "200 OK") -> bytes:
    return head("text/html", CHUNKED, status=status) + chunked(PAGE) + LAST_CHUNK


def with_head(answer: Answer, *fields: str, kind: str = "") -> bytes:
    """A good answer with more in its head, or another content type."""
    return head(kind or answer.kind, *fields, CHUNKED) + b"".join(answer.chunks) + LAST_CHUNK


def of_length(answer: Answer, length: int) -> bytes:
    """A good answer with a length in the place of chunks."""
    return head(answer.kind, f"Content-Length: {length}") + answer.body


def coded(answer: Answer, body: bytes) -> bytes:
    return head(answer.kind, "Content-Encoding: gzip", f"Content-Length: {len(body)}") + body


def other(good: Answer) -> Answer:
    """The answer to a client that had asked for a stream and not for a whole one, or the other way round."""
    return answer(good.dialect, stream=not good.stream)


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


# ---- what comes of it ----


async def _says(script: Script, sent: Sent | None, stage: Stage, _: Scale) -> Observed:
    return await observe(stage, script, sent=sent)


def _scenario(what: str, promised: Outcome, script: Script, sent: Sent | None = None) -> Scenario:
    return Scenario(what, promised, partial(_says, script, sent))


async def _refuses_early(stage: Stage, _: Scale) -> Observed:
    said = head("text/html", f"Content-Length: {len(PAGE)}", status="413 Too Large") + PAGE
    return await observe(stage, lambda _: [Read.HEAD, said, Ending.STALL], prompt=LARGE, sent=lambda _: PAGE)


LYING: Final = Chapter(
    "A provider says something else",
    "What is HTTP goes to the client as it came, also where it is no answer; what is not HTTP is the gateway's to report.",
    staged,
    [
        _scenario("a page of HTML and no HTTP (HTTP/0.9)", UNANSWERED, says(PAGE)),
        _scenario("TLS on a plain port", UNANSWERED, says(TLS_ALERT)),
        _scenario("random bytes", UNANSWERED, says(NOISE)),
        _scenario(
            "101, another protocol", UNANSWERED, says(head("x", "Upgrade: x", status="101 Switching Protocols"), NOISE)
        ),
        _scenario("headers of a megabyte", UNANSWERED, answering(lambda good: [with_head(good, "X: " + "x" * 2**20)])),
        _scenario("a length and chunks at once", UNANSWERED, answering(lambda good: [with_head(good, "Content-Length: 5")])),
        _scenario(
            "100,000 interim responses before the answer",
            UNHARMED,
            answering(lambda good: [b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000, good.whole]),
        ),
        _scenario(
            "a page of HTML with 200",
            Outcome(f"streams: {ERROR_EVENT}; whole: {VERBATIM}", f"streams: {PARTIAL}; whole: {UNKNOWN}"),
            says(page()),
            lambda _: PAGE,
        ),
        _scenario(
            "a page of HTML with 500",
            Outcome("500, just what the provider sent", NO_USAGE),
            says(page("500 Oops")),
            lambda _: PAGE,
        ),
        _scenario(
            "204 with a body",
            Outcome(
                f"streams: {refused(502)}; whole: 204, just what the provider sent",
                f"streams: {PARTIAL}; whole: {UNKNOWN}",
            ),
            says(page("204 No Content")),
            lambda _: b"",
        ),
        _scenario(
            "304 with a body",
            Outcome("304, just what the provider sent", NO_USAGE),
            says(page("304 Not Modified")),
            lambda _: b"",
        ),
        _scenario(
            "JSON to who asked for a stream, a stream to who asked for JSON",
            Outcome(VERBATIM, KNOWN),
            answering(lambda good: [other(good).whole]),
            lambda good: other(good).body,
        ),
        _scenario(
            "the wrong content type: a stream as JSON, JSON as a stream",
            Outcome(f"streams: {COMPLETE}; whole: {ERROR_EVENT}", f"streams: {UNKNOWN}; whole: {PARTIAL}"),
            answering(lambda good: [with_head(good, kind=other(good).kind)]),
        ),
        _scenario("`{}`", UNREAD, says(head("application/json", "Content-Length: 2") + b"{}"), lambda _: b"{}"),
        _scenario("a length that is too long", ALL_SAID, answering(lambda good: [of_length(good, len(good.body) + 5)])),
        _scenario("more than the length says", UNHARMED, answering(lambda good: [of_length(good, len(good.body)), PAGE])),
        _scenario(
            "half a chunk, and then the last one",
            UNFINISHED,
            answering(lambda good: [good.head, good.chunks[0], b"ff\r\n" + good.pieces[1], LAST_CHUNK]),
        ),
        _scenario(
            "a chunk's size that is no number",
            UNFINISHED,
            answering(lambda good: [good.head, good.chunks[0], b"many\r\n" + good.pieces[1]]),
        ),
        _scenario("gzip that is none", UNREAD, answering(lambda good: [coded(good, NOISE)]), lambda _: NOISE),
        Scenario(
            "413 while the request is still sent", Outcome("413, just what the provider sent", NO_USAGE), _refuses_early
        ),
        _scenario("an answer byte by byte", UNHARMED, answering(lambda good: [bytewise(good.whole)])),
    ],
)
