"""Which definitions of tools were approved: the `Approvals` protocol, and the implementation in memory.

The description and the schema of a tool are instructions to the model. A server could have them reviewed and change them
afterwards; a digest of what was approved shows it.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Final, Protocol

TRUSTED_PER_SERVER: Final = 1_000
"""So many tools of a server are trusted at first sight: one that thinks up ever new names fills no memory, and no database.
Nothing that was approved makes way for others."""


class Approvals(Protocol):
    """Keeps one digest for each tool. Methods may raise anything: the last that is known of them then holds.

    Digests come by server and by the server's own name of the tool.
    """

    async def approved(self) -> Mapping[tuple[str, str], str]:
        """The approved digests."""

    async def trust(self, digests: Mapping[tuple[str, str], str]) -> None:
        """Approve definitions that were seen first, of tools that have no approved one: who else has been faster is right.

        A server that has `TRUSTED_PER_SERVER` approved tools gets no more. Returns when it is durable.
        """

    async def approve(self, digests: Mapping[tuple[str, str], str]) -> None:
        """Approve definitions in place of those before, because somebody has said so. Returns when it is durable."""


class MemoryApprovals:
    """Keeps everything in a dictionary, for as long as the process lives."""

    def __init__(self) -> None:
        self.digests: dict[tuple[str, str], str] = {}

    async def approved(self) -> Mapping[tuple[str, str], str]:
        """The approved digests."""
        return dict(self.digests)

    async def trust(self, digests: Mapping[tuple[str, str], str]) -> None:
        """Approve definitions that were seen first."""
        known = Counter(server for server, _ in self.digests)
        for (server, tool), digest in digests.items():
            if (server, tool) not in self.digests and known[server] < TRUSTED_PER_SERVER:
                self.digests[server, tool] = digest
                known[server] += 1

    async def approve(self, digests: Mapping[tuple[str, str], str]) -> None:
        """Approve definitions."""
        self.digests.update(digests)
