"""A gateway under load, and what became of it: of the responses that a crowd saw, and of the records of all of them."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.crowd import Crowd, Ledger, Seen, answer, ledger, lost, spooled, until
from tests.support.gateway import Gateway
from tests.support.provider import ThreadedProvider

from .scenario import NOTHING, Outcome

CLIENTS: Final = 10

COMPLETE: Final = "complete"
REFUSED: Final = "complete; while it lasts 503, or broken off where that was about to end"
NOTHING_COMPLETE: Final = "nothing that a client saw complete; the counter has all else"
LOST_AND_COUNTED: Final = "what could not be written, all of it counted"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def gateway(folder: Path | None = None, **env: str) -> Iterator[Gateway]:
    """A gateway in front of a provider that answers everything. Its database is in the folder, or in its own."""
    if folder is not None:
        env["AIBRIDGE_DATABASE__URL"] = f"sqlite:///{folder}/aibridge.db"
    with (
        ThreadedProvider(answer) as provider,
        Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1", env=env) as gateway,
    ):
        yield gateway


@asynccontextmanager
async def load(gateway: Gateway) -> AsyncIterator[Crowd]:
    """A crowd that has begun; at the end each client finishes what it has begun."""
    crowd = Crowd(gateway.url)
    running = asyncio.create_task(crowd.run(CLIENTS))
    try:
        await until(lambda: len(crowd.complete) >= 3 * CLIENTS, "the crowd has not begun")
        yield crowd
    finally:
        crowd.leave()
        await running


async def goes_on(crowd: Crowd, count: int = 5 * CLIENTS) -> None:
    """That many more responses have been seen complete."""
    target = len(crowd.complete) + count
    await until(lambda: len(crowd.complete) >= target, "the crowd is stuck", 60)


async def replayed(database: Path) -> None:
    """Nothing waits in the spool any more."""
    await until(lambda: spooled(database) == 0, "the spool was not replayed", 60)


@dataclass(frozen=True, slots=True)
class Books:
    """What the crowd saw beside what the ledger has, once all is quiet."""

    seen: Sequence[Seen]
    ledger: Ledger
    counted: Counter[str]
    """Records that the gateway says were lost, by kind."""

    @classmethod
    async def of(cls, seen: Sequence[Seen], gateway: Gateway, database: Path) -> "Books":
        await replayed(database)
        return cls(seen, ledger(database), await lost(gateway.url))

    @property
    def outcome(self) -> Outcome:
        """In the words of the table."""
        return Outcome(self._client(), self._ledger(), self._lost())

    def _client(self) -> str:
        kinds = {one.status if one.complete or one.status != 200 else "broken off" for one in self.seen}
        if kinds == {200}:
            return COMPLETE
        return REFUSED if kinds <= {200, 503, "broken off"} else f"complete or {kinds - {200}}"

    def _ledger(self) -> str:
        """What has no end for want of room is no status, and must be counted as lost."""
        return ", ".join(f"`{status}`" for status in sorted(self.ledger.statuses) if status != "in_progress")

    def _lost(self) -> str:
        """What clients saw complete and the ledger has not once and whole; what else is missing; what of that is counted."""
        complete = [one for one in self.seen if one.complete and one.status == 200]
        missing = sum(self.ledger.completed[one.response_id] != 1 for one in complete)
        gap = self._gap()
        if not self._is_counted(gap):
            return f"{dict(gap)}, of which {dict(self.counted)} are counted"
        if missing:
            return LOST_AND_COUNTED
        return NOTHING_COMPLETE if self.counted else NOTHING

    def _is_counted(self, gap: Counter[str]) -> bool:
        """A request is refused because its start was lost, which counts, or because others were, and then it has none."""
        more = self.counted - gap
        return not gap - self.counted and more.keys() <= {"Interception"} and more.total() <= len(self.seen) - self._served

    @property
    def _served(self) -> int:
        return sum(one.status == 200 for one in self.seen)

    def _gap(self) -> Counter[str]:
        """The records that are missing, by kind. Of a request that was refused there was to be none."""
        counts, statuses = self.ledger.counts, self.ledger.statuses
        served = self._served
        return +Counter(
            Interception=served - counts["interceptions"],
            PromptUsage=served - counts["user_prompts"],
            TokenUsage=served - counts["token_usages"],
            InterceptionEnded=served - counts["interceptions"] + statuses["in_progress"],
        )
