"""Pieces of recorded streams, and providers that wait between them for a test to say go."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from .provider import Gate, Reply, Step, Wait
from .recording import Format, Recording

PROVIDERS: Final[dict[Format, str]] = {"messages": "anthropic", "chat": "openai", "responses": "openai"}
"""The provider, as configured without saying anything, that speaks a format."""


def target(recording: Recording, suffix: str = "") -> str:
    """The path on the gateway; ``suffix`` makes it another provider of the same kind."""
    provider = PROVIDERS[recording.format]
    if suffix:
        provider = suffix if provider == "anthropic" else f"{suffix}-openai"
    return f"/{provider}{recording.path}"


def events(body: bytes) -> list[bytes]:
    """A stream in events, each with the blank line that ends it. For streams that end their lines with LF."""
    pieces = [piece + b"\n\n" for piece in body.split(b"\n\n") if piece]
    assert b"".join(pieces) == body
    return pieces


def lock_step(recording: Recording, pieces: Sequence[bytes]) -> tuple[Reply, list[Gate]]:
    """A reply that sends a piece and then waits for its gate, before the next piece and before the end of the body."""
    gates = [Gate() for _ in pieces]
    steps: list[Step] = []
    for piece, gate in zip(pieces, gates, strict=True):
        steps += [piece, Wait(gate)]
    return replace(recording.reply(), body=steps), gates
