"""What /metrics says, read with prometheus-client's own parser."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from .provider import WAIT_SECONDS
from .rawclient import RawClient

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """What /metrics said once."""

    samples: Mapping[str, Mapping[Labels, float]]

    def all(self, name: str, *by: str) -> dict[tuple[str, ...], float]:
        """The samples of that name, by the values of labels, which must be all that they have."""
        found = self.samples.get(f"aibridge_{name}", {})
        assert all({label for label, _ in labels} == set(by) for labels in found), found
        return {tuple(dict(labels)[label] for label in by): value for labels, value in found.items()}

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples.get(f"aibridge_{name}", {}).get(frozenset(labels.items()))


async def scrape(gateway_url: str) -> Scrape:
    async with RawClient(gateway_url) as client:
        answer = await client.request("GET", "/metrics")
    assert answer.head.status == 200 and str(answer.head.get("content-type")).startswith("text/plain; version=")
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            series = samples.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in series, "a series comes once"
            series[labels] = sample.value
    return Scrape(samples)


async def until(gateway_url: str, condition: Callable[[Scrape], bool]) -> Scrape:
    """The first scrape of which it holds."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition(found := await scrape(gateway_url)):
            await asyncio.sleep(0.02)
    return found
