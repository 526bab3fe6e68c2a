"""aibridge: a gateway between AI clients and AI providers that relays faithfully and keeps an honest ledger.

The nouns of the domain, from the outside in:

* A *client* (Claude Code, an SDK) sends a *request* on behalf of an *actor* to a *provider* (Anthropic, OpenAI, anything
  that speaks their protocols), through a *bridge*.
* A request on an intercepted *route* becomes an *interception*. A *conversation* carries it out: one client request, one or
  more *turns* of the provider.
* A *wire format* reads a protocol's requests and responses and answers with *facts*: the prompt, the token *usage*, the
  *tool calls*, the *thoughts*. Bytes are passed on as they are.
* Facts become *records*, which a *recorder* makes durable: together they are the *ledger*. *Observers* (metrics, traces,
  logs) see the same records.

Where to start reading: `aibridge.relay` is the life of a request, `aibridge.conversation` the engine, `aibridge.wire` the
protocols. ``docs/architecture.md`` has the map.
"""

from importlib.metadata import version

from aibridge.bridge import RequestBridge
from aibridge.identity import Actor, as_actor
from aibridge.metrics import Metrics
from aibridge.providers import Provider
from aibridge.recording import MemoryRecorder, Recorder, SqliteRecorder
from aibridge.relay import Interceptor

__version__ = version("aibridge")

__all__ = [
    "Actor",
    "Interceptor",
    "MemoryRecorder",
    "Metrics",
    "Provider",
    "Recorder",
    "RequestBridge",
    "SqliteRecorder",
    "__version__",
    "as_actor",
]
