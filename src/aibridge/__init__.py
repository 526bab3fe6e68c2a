"""aibridge: a gateway between AI clients and AI providers that relays faithfully and keeps an honest ledger.

The nouns of the domain, from the outside in:

* A *client* (Claude Code, an SDK) sends a *request* on behalf of an *actor* to a *provider* (Anthropic, OpenAI, anything
  that speaks their protocols), through a *bridge*.
* A request on an intercepted *route* becomes an *interception*. A *conversation* carries it out: one client request, one or
  more *turns* of the provider.
* A *wire format* reads a protocol's requests and responses and answers with *facts*: the prompt, the token *usage*, the
  *tool calls*, the *thoughts*. Bytes are passed on as they are.
* With an *injection* requests get *tools* that a *toolbox* runs, such as those of MCP servers. What the client does not see
  of that is kept in the *history* and put back into later requests.
* Facts become *records*, which a *recorder* makes durable: together they are the *ledger*. *Observers* (metrics, traces,
  logs) see the same records.

Where to start reading: `aibridge.relay` is the life of a request, `aibridge.conversation` the engine, `aibridge.wire` the
protocols. ``docs/architecture.md`` has the map.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from aibridge.breakers import BreakerRules
from aibridge.bridge import RequestBridge
from aibridge.dumps import TrafficDumps
from aibridge.history import History, MemoryHistory
from aibridge.identity import Actor, as_actor
from aibridge.injection import Injection
from aibridge.limits import Limits
from aibridge.mcp.settings import McpServer
from aibridge.metrics import Metrics
from aibridge.providers import Provider
from aibridge.recording import MemoryRecorder, Recorder, SqliteApprovals, SqliteHistory, SqliteRecorder
from aibridge.relay import Interceptor
from aibridge.retries import RetryRules
from aibridge.toolbox import MemoryToolbox, Toolbox
from aibridge.tools import Outcome, Text, Tool

if TYPE_CHECKING:
    from aibridge.mcp.proxy import McpProxy
    from aibridge.tracing import Traces

__version__ = version("aibridge")

__all__ = [
    "Actor",
    "BreakerRules",
    "History",
    "Injection",
    "Interceptor",
    "Limits",
    "McpProxy",
    "McpServer",
    "MemoryHistory",
    "MemoryRecorder",
    "MemoryToolbox",
    "Metrics",
    "Outcome",
    "Provider",
    "Recorder",
    "RequestBridge",
    "RetryRules",
    "SqliteApprovals",
    "SqliteHistory",
    "SqliteRecorder",
    "Text",
    "Tool",
    "Toolbox",
    "Traces",
    "TrafficDumps",
    "__version__",
    "as_actor",
]


def __getattr__(name: str) -> Any:
    """What takes long to load, when somebody asks for it: the MCP SDK most of a second, OpenTelemetry a tenth of one."""
    if name == "McpProxy":
        from aibridge.mcp.proxy import McpProxy  # noqa: PLC0415

        return McpProxy
    if name == "Traces":
        from aibridge.tracing import Traces  # noqa: PLC0415

        return Traces
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
