"""What /metrics says of retries, circuit breakers and refusals, by a real gateway.

Truth: issue 5, point 1, and its list of metrics ("breaker state (0, 0.5, 1), trips and rejects"); the script for the
numbers. When a breaker opens and closes is tests/test_breakers.py's to judge.
"""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.support.gateway import Scene, Stage, staged
from tests.support.injected import Says, turn
from tests.support.injected_dialects import MESSAGES
from tests.support.provider import Gate, Reply, Wait
from tests.support.scrape import Scrape, scrape, until
from tests.test_metrics import ALL

TOML: Final = """
[limits]
max_concurrent = 1

[providers.flaky]
kind = "anthropic"
base_url = "{provider}"
[providers.flaky.retries]
attempts = 2
statuses = [503]
max_delay = 0.05

[providers.broken]
kind = "anthropic"
base_url = "{provider}"
[providers.broken.breaker]
enabled = true
threshold = 2
open_seconds = 5
"""
ROUTE: Final = "/v1/messages"
BODY: Final = MESSAGES.request(stream=False)
DOWN: Final = Reply.json({"type": "error", "error": {"type": "api_error", "message": "Down."}}, 503)
UP: Final = Reply.json(MESSAGES.body(turn(1, Says("Yes.")), json.loads(BODY)))


async def ask(scene: Scene, provider: str) -> int:
    return (await scene.post(f"/{provider}{ROUTE}", BODY)).head.status


async def played(stage: Stage) -> Mapping[str, Scrape]:
    url, at = stage.gateway.url, {}
    with stage.scene() as scene:
        scene.reply(DOWN, DOWN, UP)
        assert await ask(scene, "flaky") == 200
        at["retried"] = await scrape(url)

        scene.reply(DOWN, DOWN)
        assert [await ask(scene, "broken") for _ in range(3)] == [503, 503, 503]
        assert len(scene.requests) == 5, "the last one was not sent"
        at["open"] = await scrape(url)

        probe = Gate()
        scene.reply(Reply(UP.status, UP.headers, UP.body, UP.framing, before=[Wait(probe)]))
        probing = asyncio.create_task(until_it_answers(scene))
        at["half-open"] = await until(url, lambda found: state(found) == 0.5)
        assert await ask(scene, "flaky") == 503, "one at a time"
        probe.set()
        await probing
        at["closed"] = await scrape(url)
    return at


async def until_it_answers(scene: Scene) -> None:
    while await ask(scene, "broken") == 503:
        await asyncio.sleep(0.05)


def state(found: Scrape) -> float | None:
    return found.value("breaker_state", provider="broken", route=ROUTE, model="m")


@pytest.fixture(scope="module")
def at() -> Iterator[Mapping[str, Scrape]]:
    with staged(TOML) as stage:
        yield asyncio.run(played(stage))


def test_retries(at: Mapping[str, Scrape]) -> None:
    by = ALL["upstream_retries_total"]
    assert at["retried"].all("upstream_retries_total", *by) == {("flaky", "503"): 2}
    assert at["closed"].all("upstream_retries_total", *by) == {("flaky", "503"): 2}
    by = ALL["upstream_responses_total"]
    assert at["retried"].all("upstream_responses_total", *by) == {("flaky", "5xx"): 2, ("flaky", "2xx"): 1}
    assert at["retried"].all("upstream_calls_inflight", "provider") == {("flaky",): 0}
    ended = at["retried"].all("interceptions_total", *ALL["interceptions_total"])
    assert [(labels[2], count) for labels, count in ended.items()] == [("completed", 1)]


def test_a_breaker(at: Mapping[str, Scrape]) -> None:
    place = ("broken", ROUTE, "m")
    by = ALL["breaker_state"]
    states = [at[moment].all("breaker_state", *by) for moment in ("retried", "open", "half-open", "closed")]
    assert states == [{}, {place: 1}, {place: 0.5}, {place: 0}]
    trips = [at[moment].all("breaker_trips_total", *by) for moment in ("retried", "open", "closed")]
    assert trips == [{}, {place: 1}, {place: 1}]
    assert at["open"].all("breaker_rejections_total", *by) == {place: 1}


def test_calls_of_a_breaker(at: Mapping[str, Scrape]) -> None:
    """What it kept from the provider was no call."""
    assert at["open"].value("upstream_responses_total", provider="broken", status="5xx") == 2
    assert at["half-open"].value("upstream_calls_inflight", provider="broken") == 1
    assert at["closed"].value("upstream_calls_inflight", provider="broken") == 0


def test_every_metric_is_looked_at() -> None:
    """Here, or in the scripted conversation: whoever adds a metric has a number to say what it must be."""
    sources = "".join(path.read_text() for path in (Path(__file__), Path(__file__).with_name("test_metrics_scrape.py")))
    assert [name for name in ALL if not re.search(rf'"{name}(_count|_sum)?"', sources)] == []


def test_refusals(at: Mapping[str, Scrape]) -> None:
    assert at["half-open"].all("refusals_total", *ALL["refusals_total"]) == {}
    assert at["closed"].all("refusals_total", *ALL["refusals_total"]) == {("flaky", "concurrency"): 1}
    assert at["closed"].value("interceptions_inflight", provider="flaky", model="m", route=ROUTE) == 0
