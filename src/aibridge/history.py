"""Where the hidden turns of conversations are kept: the `History` protocol, and the implementation in memory.

A client replays what it was shown. What it was not shown, the injected calls and their results, is remembered here under
keys that stand for what it does replay (`aibridge.wire.turns`), so that a later request of the conversation gets it back.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from aibridge.wire.turns import Memory


class History(Protocol):
    """Keeps memories, apart for each `scope`: nobody gets to see what was hidden in somebody else's conversation.

    One that is an async context manager is entered and left together with the bridge. Methods may raise anything; the
    request then goes on as the client sent it.
    """

    async def recall(self, scope: str, keys: Sequence[str]) -> Mapping[str, Memory]:
        """The newest memory under each of the keys, where there is one. Recalling keeps memories from expiring.

        A memory that was dropped for its age or size comes back without its `data`, as long as that is known.
        """

    async def remember(self, scope: str, memory: Memory, toolset: bytes) -> None:
        """Keep a memory under all its keys, and the encoded tool set that `memory.toolset` is the digest of, or neither.

        Returns when they are durable.
        """

    async def recall_toolset(self, digest: str) -> bytes | None:
        """The encoded tool set with that digest, which came with a memory; None when it is not there any more."""


class MemoryHistory:
    """Keeps everything in dictionaries, for as long as the process lives."""

    def __init__(self) -> None:
        self.memories: dict[tuple[str, str], Memory] = {}
        self.toolsets: dict[str, bytes] = {}

    async def recall(self, scope: str, keys: Sequence[str]) -> Mapping[str, Memory]:
        """The newest memory under each of the keys, where there is one."""
        return {key: found for key in keys if (found := self.memories.get((scope, key))) is not None}

    async def remember(self, scope: str, memory: Memory, toolset: bytes) -> None:
        """Keep a memory under all its keys, and its tool set."""
        self.memories |= {(scope, key): memory for key in memory.keys}
        self.toolsets[memory.toolset] = toolset

    async def recall_toolset(self, digest: str) -> bytes | None:
        """The encoded tool set with that digest."""
        return self.toolsets.get(digest)
