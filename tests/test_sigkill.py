"""Issue 2, criterion 4: under 50 concurrent clients, SIGKILL at a random moment, 20 times.

No response that a client saw complete is missing from the database, and after a restart no interception is left
`in_progress`. The moments are seeded: so many responses after the start, then up to 20 ms later.
"""

import asyncio
import random

import pytest

from tests.support.crowd import Crowd, answer, assert_nothing_is_missing, ledger
from tests.support.gateway import Gateway
from tests.support.provider import ThreadedProvider

CLIENTS = 50
ROUNDS = 5
RUNS = 4


@pytest.mark.parametrize("run", range(RUNS))
async def test_nothing_that_a_client_saw_complete_is_missing_after_a_sigkill(run: int) -> None:
    chance = random.Random(run)
    interrupted = 0
    with (
        ThreadedProvider(answer) as provider,
        Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1") as gateway,
    ):
        for this_round in range(ROUNDS):
            crowd = Crowd(gateway.url, seed=run * ROUNDS + this_round)
            await killed_amid(crowd, gateway, after=chance.randint(1, 200), delay=chance.uniform(0, 0.02))
            gateway.start()
            assert_nothing_is_missing(crowd.complete, gateway.database)
            found = ledger(gateway.database).statuses
            assert found["in_progress"] == 0
            assert found["interrupted"] >= interrupted
            interrupted = found["interrupted"]
    assert interrupted > 0  # otherwise nothing was under way, and nothing was shown


async def killed_amid(crowd: Crowd, gateway: Gateway, *, after: int, delay: float) -> None:
    left = after

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            asyncio.get_running_loop().call_later(delay, gateway.process.kill)

    crowd.on_complete = count
    async with asyncio.timeout(30):
        await crowd.run(CLIENTS)
    gateway.process.wait(10)
    assert len(crowd.complete) >= after
