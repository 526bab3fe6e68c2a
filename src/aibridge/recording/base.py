"""The `Recorder` protocol, and the implementation that keeps everything in memory."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from aibridge.errors import RecordingFailed
from aibridge.events import RecordLost, RecordsReplayed, RecordsWritten
from aibridge.records import (
    Interception,
    InterceptionEnded,
    ModelThought,
    PromptUsage,
    TokenUsage,
    ToolUsage,
)

Report = Callable[[RecordLost | RecordsWritten | RecordsReplayed], None]
"""Is told, in the event loop, what a recorder does. A `RecordLost` is about a record that was durable, and is lost all the
same: of others their futures tell.
"""


class RecordsLost(RecordingFailed):
    """Some of the records that were handed over together are lost: which, by their place, and why."""

    def __init__(self, lost: Mapping[int, str]) -> None:
        super().__init__("; ".join(dict.fromkeys(lost.values())))
        self.lost = lost


class Recorder(Protocol):
    """Keeps records. Each method returns an awaitable that is done when the record is durable; ``async def`` will do.

    The records of one interception come in order, its start first; nothing else of it comes before the start is done.
    What a method raises means that the record is lost.
    A recorder that is an async context manager is entered and left together with the bridge.
    A recorder may also have ``record_model_thought(record: ModelThought)``; without it thoughts are not kept. And it may
    have ``report_to(report: Report)``, by which it gets to know whom to tell what it does; and
    ``record_together(records: Sequence[Record])``, which is called instead of the others, with what is known at one time of
    one interception, and whose awaitable may raise `RecordsLost`. A subclass that overrides one of the others and not this
    is called record by record. And ``failing: bool``, by which it says that records are being lost, and would be.
    """

    def record_interception(self, record: Interception, /) -> Awaitable[None]:
        """An interception begins. Nothing goes upstream before this is done."""

    def record_interception_ended(self, record: InterceptionEnded, /) -> Awaitable[None]:
        """An interception has ended. The client does not see the end of its response before this is done."""

    def record_token_usage(self, record: TokenUsage, /) -> Awaitable[None]:
        """An upstream response reported its usage, or ended without."""

    def record_prompt_usage(self, record: PromptUsage, /) -> Awaitable[None]:
        """The user asked something."""

    def record_tool_usage(self, record: ToolUsage, /) -> Awaitable[None]:
        """The model called a tool."""


class MemoryRecorder:
    """Keeps records in lists, in the order in which they came."""

    def __init__(self) -> None:
        self.interceptions: list[Interception] = []
        self.ended: list[InterceptionEnded] = []
        self.token_usages: list[TokenUsage] = []
        self.prompts: list[PromptUsage] = []
        self.tool_usages: list[ToolUsage] = []
        self.thoughts: list[ModelThought] = []

    async def record_interception(self, record: Interception) -> None:
        """Keep the start of an interception."""
        self.interceptions.append(record)

    async def record_interception_ended(self, record: InterceptionEnded) -> None:
        """Keep the end of an interception."""
        self.ended.append(record)

    async def record_token_usage(self, record: TokenUsage) -> None:
        """Keep a usage."""
        self.token_usages.append(record)

    async def record_prompt_usage(self, record: PromptUsage) -> None:
        """Keep a prompt."""
        self.prompts.append(record)

    async def record_tool_usage(self, record: ToolUsage) -> None:
        """Keep a tool call."""
        self.tool_usages.append(record)

    async def record_model_thought(self, record: ModelThought) -> None:
        """Keep a thought."""
        self.thoughts.append(record)
