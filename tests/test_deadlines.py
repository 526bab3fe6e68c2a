"""One timer for the deadlines of many. Truth: the docstrings of `aibridge.deadlines`."""

import asyncio
import math

import pytest

from aibridge.deadlines import Deadlines

SECONDS = 0.01


class Member:
    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.expired = asyncio.Event()

    def expire(self) -> None:
        self.deadline = math.inf
        self.expired.set()


class Failing(Member):
    def expire(self) -> None:
        super().expire()
        raise ZeroDivisionError


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


async def test_a_deadline_that_is_moved_is_told_when_it_has_passed() -> None:
    loop = asyncio.get_running_loop()
    late, moved, never = Member(loop.time()), Member(loop.time() + 60), Member()
    deadlines = Deadlines([late, moved, never], SECONDS)
    deadlines.start()
    deadlines.start()
    async with asyncio.timeout(10):
        await late.expired.wait()
        assert not moved.expired.is_set()
        moved.deadline = loop.time()
        await moved.expired.wait()
    deadlines.stop()
    assert not never.expired.is_set()


async def test_it_stops_with_nothing_to_look_after_and_starts_again() -> None:
    members: list[Member] = []
    deadlines = Deadlines(members, SECONDS)
    deadlines.start()
    async with asyncio.timeout(10):
        while deadlines._timer is not None:
            await asyncio.sleep(SECONDS)
        members.append(Member(0))
        deadlines.start()
        await members[0].expired.wait()
    deadlines.stop()
    deadlines.stop()


async def test_one_that_fails_does_not_end_the_time_of_all_others() -> None:
    loop = asyncio.get_running_loop()
    told: list[object] = []
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
    failing, late = Failing(0), Member()
    deadlines = Deadlines([failing, late], SECONDS)
    deadlines.start()
    async with asyncio.timeout(10):
        await failing.expired.wait()
        late.deadline = 0
        await late.expired.wait()
    deadlines.stop()
    assert [type(error) for error in told] == [ZeroDivisionError]
