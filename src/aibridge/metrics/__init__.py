"""Prometheus metrics, as one of the bridge's observers. Names and labels are a contract (docs/metrics.md).

`Metrics` hands each event to who counts events of that type. What nobody tells of (connections, queues, the event loop) it
is shown now and then, as a `Sample`: in the server by `aibridge.sampler`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry

from aibridge.events import Event
from aibridge.metrics.interceptions import Interceptions
from aibridge.metrics.recording import Recording
from aibridge.metrics.series import Bounds, Children, Maker
from aibridge.metrics.upstream import Breakers, Calls, Pool
from aibridge.upstream import Connections

__all__ = ["Bounds", "Metrics", "Sample"]

_LAGS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_GONE: Final = float("nan")
_BOUNDS: Final = Bounds()


class Sample(msgspec.Struct, frozen=True):
    """How things are at the moment.

    `lag` is by how many seconds the event loop was late, `connections` are those to each provider's host. `queued`
    submissions wait for the recorder, and `spool_bytes` for the database. `mcp_servers` says which of them are connected.
    """

    lag: float
    ready: bool
    connections: Mapping[str, Connections]
    queued: int
    spool_bytes: int
    mcp_servers: Mapping[str, bool]


class Metrics:
    """Counts what happens. Give it to a `RequestBridge` as an observer.

    `namespace` is put before each name, with an underscore; the server uses ``aibridge``.
    """

    def __init__(self, registry: CollectorRegistry, *, namespace: str = "", bounds: Bounds = _BOUNDS) -> None:
        make = Maker(registry, namespace)
        self._recording = Recording(make)
        self._pool = Pool(make)
        self._lag = make.histogram("event_loop_lag_seconds", "By how much the event loop was late.", buckets=_LAGS)
        self._ready = make.gauge("ready", "Whether requests are served: 1, or 0.", combined="livemin")
        self._mcp_servers = Children(
            make.gauge("mcp_server_connected", "Whether an MCP server is connected: 1, or 0.", "server", combined="livemin")
        )
        self._consumers: dict[type, Callable[[Any], None]] = {
            **Interceptions(make, bounds).consumers,
            **Calls(make, bounds).consumers,
            **Breakers(make, bounds).consumers,
            **self._recording.consumers,
        }

    def __call__(self, event: Event) -> None:
        """Count an event."""
        consume = self._consumers.get(type(event))
        if consume is not None:
            consume(event)

    def show(self, sample: Sample) -> None:
        """Show how things are. MCP servers that are no more among them are gone: they have no value (NaN)."""
        self._lag.observe(sample.lag)
        self._ready.set(sample.ready)
        self._recording.show(sample.queued, sample.spool_bytes)
        self._pool.show(sample.connections)
        for (server,) in self._mcp_servers.keys() - {(server,) for server in sample.mcp_servers}:
            self._mcp_servers[server,].set(_GONE)
        for server, connected in sample.mcp_servers.items():
            self._mcp_servers[server,].set(connected)
