"""What every history does, in memory and in SQLite.

Truth: `aibridge.history.History`; wire.md D6 for what it is there for.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

import pytest

from aibridge.history import History, MemoryHistory
from aibridge.recording import SqliteHistory
from aibridge.tools import Tool, Toolset
from aibridge.wire.turns import Memory, key_of
from tests.support.provider import WAIT_SECONDS

TOOLS = b"[]"
HIDDEN = b'[{"type":"tool_use", "id" :"toolu_1","input":{"a":1.0e2}}]\x00\xff'


@pytest.fixture(params=["memory", "sqlite"])
async def history(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[History]:
    subject: History = MemoryHistory() if request.param == "memory" else SqliteHistory(tmp_path / "aibridge.db")
    async with AsyncExitStack() as stack, asyncio.timeout(WAIT_SECONDS):
        if isinstance(subject, AbstractAsyncContextManager):
            await stack.enter_async_context(subject)
        yield subject


def memory(*keys: str, data: bytes | None = HIDDEN) -> Memory:
    return Memory(keys, "digest", data)


async def test_a_memory_comes_back_under_each_of_its_keys(history: History) -> None:
    kept = memory("b", "a", "c")
    await history.remember("ada", kept, TOOLS)
    assert await history.recall("ada", ["c", "x", "a"]) == {"c": kept, "a": kept}
    assert await history.recall("ada", ("b",)) == {"b": kept}


async def test_all_of_a_memory_comes_back(history: History) -> None:
    kept = Memory(("a",), "digest", HIDDEN, "resp_22222222")
    await history.remember("ada", kept, TOOLS)
    assert await history.recall("ada", ["a"]) == {"a": kept}


async def test_what_was_never_remembered_is_not_there(history: History) -> None:
    assert await history.recall("ada", ["a"]) == {}
    await history.remember("ada", memory("a"), TOOLS)
    assert await history.recall("ada", []) == {}
    assert await history.recall("ada", ["A", "a ", ""]) == {}


async def test_nobody_sees_what_was_hidden_from_somebody_else(history: History) -> None:
    await history.remember("ada", memory("a", data=b"hers"), TOOLS)
    assert await history.recall("bob", ["a"]) == {}
    assert await history.recall("", ["a"]) == {}
    await history.remember("bob", memory("a", data=b"his"), TOOLS)
    assert await history.recall("ada", ["a"]) == {"a": memory("a", data=b"hers")}
    assert await history.recall("bob", ["a"]) == {"a": memory("a", data=b"his")}


async def test_the_newest_memory_under_a_key_counts(history: History) -> None:
    older, newer = memory("same", "older", data=b"1"), memory("newer", "same", data=b"2")
    await history.remember("ada", older, TOOLS)
    await history.remember("ada", newer, TOOLS)
    found = await history.recall("ada", ["same", "older", "newer"])
    assert found == {"same": newer, "older": older, "newer": newer}


@pytest.mark.parametrize("data", [b"", None, b"\0"])
async def test_nothing_hidden_is_not_the_same_as_lost(history: History, data: bytes | None) -> None:
    await history.remember("ada", memory("a", data=data), TOOLS)
    assert (await history.recall("ada", ["a"]))["a"].data == data


async def test_a_key_may_be_repeated(history: History) -> None:
    kept = memory("a", "a")
    await history.remember("ada", kept, TOOLS)
    assert await history.recall("ada", ["a", "a"]) == {"a": kept}


async def test_a_memory_without_keys_is_never_found_and_does_no_harm(history: History) -> None:
    await history.remember("ada", memory(), TOOLS)
    assert await history.recall("ada", ["a"]) == {}


async def test_a_long_conversation(history: History) -> None:
    """Each turn has the keys that a format gives it: ids, signatures, what was said (wire.md D6)."""
    turns = [memory(key_of("id", f"{n}"), key_of("signature", f"{n}"), data=b"%d" % n * 1000) for n in range(300)]
    for turn in turns:
        await history.remember("ada", turn, TOOLS)
    keys = [key for turn in turns for key in turn.keys]
    assert await history.recall("ada", keys) == {key: turn for turn in turns for key in turn.keys}


async def test_conversations_at_the_same_time(history: History) -> None:
    async def one(name: str) -> None:
        for n in range(10):
            turn = memory(f"{n}", data=f"{name} {n}".encode())
            await history.remember(name, turn, TOOLS)
            assert (await history.recall(name, [f"{n}"]))[f"{n}"] == turn
        found = await history.recall(name, [f"{n}" for n in range(10)])
        assert [found[f"{n}"].data for n in range(10)] == [f"{name} {n}".encode() for n in range(10)]

    await asyncio.gather(*(one(f"user {n}") for n in range(50)))


async def test_a_tool_set_comes_back_as_it_was(history: History) -> None:
    toolset = Toolset([Tool("bmcp_a_é", "Says.", '{"type" : "object"}', "a", "é", "http://a")])
    assert await history.recall_toolset(toolset.digest) is None
    for key in ("a", "b"):
        await history.remember("ada", Memory((key,), toolset.digest, HIDDEN), toolset.encoded)
        assert await history.recall_toolset(toolset.digest) == toolset.encoded
    assert await history.recall_toolset("another") is None
