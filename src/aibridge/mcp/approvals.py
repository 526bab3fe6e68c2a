"""Which definitions of tools were approved: the `Approvals` protocol, and the implementation in memory.

The description and the schema of a tool are instructions to the model. A server could have them reviewed and change them
afterwards; a digest of what was approved shows it.
"""

from collections.abc import Mapping
from typing import Protocol


class Approvals(Protocol):
    """Keeps one digest for each tool. Methods may raise anything: the last that is known of them then holds."""

    async def approved(self) -> Mapping[tuple[str, str], str]:
        """The approved digests by server and tool, under the tool's own name."""

    async def approve(self, server: str, tool: str, digest: str) -> None:
        """Approve a definition, in place of the one before. Returns when it is durable."""


class MemoryApprovals:
    """Keeps everything in a dictionary, for as long as the process lives."""

    def __init__(self) -> None:
        self.digests: dict[tuple[str, str], str] = {}

    async def approved(self) -> Mapping[tuple[str, str], str]:
        """The approved digests by server and tool."""
        return dict(self.digests)

    async def approve(self, server: str, tool: str, digest: str) -> None:
        """Approve a definition."""
        self.digests[server, tool] = digest
