"""Providers that say too much."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .asking import Sent, Stage, observe, staged
from .clients import VERBATIM
from .lies import UNHARMED, UNKNOWN, answering, coded
from .providers import UNFINISHED
from .rawprovider import LAST_CHUNK, Answer, Ending, Script, Step, chunked
from .scenario import Chapter, Observed, Outcome, Scale, Scenario

MEGABYTE: Final = 2**20
AT_ONCE: Final = 6
BOUND: Final = 100 * MEGABYTE
"""For one response: what is kept of a whole one is 64 MB, of one event 32 MB."""

LONG: Final = b'"pad":"' + b"x" * (10 * MEGABYTE) + b'",'


def with_a_long_line(good: Answer) -> Iterator[Step]:
    """An event of 10 MB among the others, or a whole answer with as much in it."""
    yield good.head
    if good.stream:
        yield good.chunks[0] + chunked(b'data: {"type":"ping","choices":[],' + LONG + b'"last":1}\n\n')
        yield b"".join(good.chunks[1:]) + LAST_CHUNK
    else:
        yield chunked(good.body.replace(b"{", b"{" + LONG, 1)) + LAST_CHUNK


def with_an_endless_line(good: Answer) -> Iterator[Step]:
    yield good.head
    if good.stream:
        yield good.chunks[0]
    yield chunked(b'data: {"type":"ping","choices":[],' + LONG)
    yield Ending.FIN


def of_many_pieces(good: Answer, count: int) -> Iterator[Step]:
    """So many tiny events, each a chunk of its own, or as many chunks of one byte, before the rest of the answer."""
    tiny = chunked(b'data: {"type":"ping","choices":[]}\n\n' if good.stream else b" ")
    yield good.head
    if good.stream:
        yield b"".join(good.chunks[:2])
    yield [tiny * 1000] * (count // 1000)
    yield b"".join(good.chunks[2:] if good.stream else good.chunks) + LAST_CHUNK


async def _within_memory(stage: Stage, script: Script, sent: Sent | None = None) -> Observed:
    """Observe what comes of it with six at once, and whether the gateway's memory is bounded."""
    Path(f"/proc/{stage.gateway.process.pid}/clear_refs").write_text("5")  # the peak begins anew (proc(5))
    before = stage.gateway.memory()
    observed = await observe(stage, script, sent=sent, sdks=False)
    grown = (stage.gateway.memory() - before) // AT_ONCE
    client, ledger, lost = observed.outcome
    return Observed(Outcome(client, ledger, lost if grown < BOUND else f"{lost}, but {grown // MEGABYTE} MB of memory each"))


async def _bomb(stage: Stage, scale: Scale) -> Observed:
    packer = zlib.compressobj(9, wbits=31)
    spaces = b" " * MEGABYTE
    bomb = b"".join(packer.compress(spaces) for _ in range(scale.inflated)) + packer.flush()
    return await _within_memory(stage, answering(lambda good: [coded(good, bomb)]), lambda _: bomb)


async def _long_line(stage: Stage, _: Scale) -> Observed:
    return await _within_memory(stage, answering(with_a_long_line))


async def _endless_line(stage: Stage, _: Scale) -> Observed:
    return await _within_memory(stage, answering(with_an_endless_line))


async def _many_pieces(stage: Stage, scale: Scale) -> Observed:
    return await _within_memory(stage, answering(lambda good: of_many_pieces(good, scale.events)))


EXCESS: Final = Chapter(
    "A provider says too much",
    "With six responses at once, of which none may take more than 100 MB of memory.",
    staged,
    [
        Scenario("a line of 10 MB in one event", UNHARMED, _long_line),
        Scenario("a line of 10 MB, and no end", UNFINISHED, _endless_line),
        Scenario("a million tiny events, each a chunk", UNHARMED, _many_pieces),
        Scenario("a gzip bomb that inflates to a gigabyte", Outcome(VERBATIM, UNKNOWN), _bomb),
    ],
)
