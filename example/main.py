"""aibridge as a library: a gateway of your own, in a FastAPI application of your own.

Run it with ``make example``, then point a client at it and say who you are:

    curl http://127.0.0.1:8081/ai/anthropic/v1/messages -H 'x-user: ada' -H "x-api-key: $ANTHROPIC_API_KEY" \
         -H 'anthropic-version: 2023-06-01' -H 'content-type: application/json' \
         -d '{"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": "What time is it?"}]}'
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, generate_latest
from starlette.types import ASGIApp, Receive, Scope, Send

from aibridge import (
    Actor,
    Injection,
    McpProxy,
    McpServer,
    Metrics,
    Provider,
    RequestBridge,
    SqliteApprovals,
    SqliteHistory,
    SqliteRecorder,
    as_actor,
)

# Providers are data. A key that is set here is used for everybody; without one each client brings its own.
providers = [
    Provider.anthropic(api_key=os.environ.get("ANTHROPIC_API_KEY")),
    Provider.openai(api_key=os.environ.get("OPENAI_API_KEY")),
    # Anything that speaks one of the protocols, under a name of its own:
    Provider.openai("ollama", base_url="http://127.0.0.1:11434/v1"),
]

# Tools for everybody: those of a public server, and of one that is started here (pip install mcp-server-time). The bridge
# starts without a server that cannot be reached. Clients see nothing of them.
tools = McpProxy(
    {
        "deepwiki": McpServer(url="https://mcp.deepwiki.com/mcp", allow=("^ask_question$",)),
        "time": McpServer(command=(sys.executable, "-m", "mcp_server_time")),
    },
    approvals=SqliteApprovals("example.db"),
)

# Where records are kept, and who else gets to see them: any callable that takes an event is an observer.
recorder = SqliteRecorder("example.db")
registry = CollectorRegistry()
bridge = RequestBridge(
    providers,
    recorder,
    observers=[Metrics(registry, namespace="aibridge")],
    injection=Injection(tools, SqliteHistory("example.db")),
)


class WhoIsIt:
    """Puts the actor into the scope. Yours would check a session, a token, a certificate; this one believes a header."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection; without an actor the bridge refuses the request."""
        user = dict(scope["headers"]).get(b"x-user") if scope["type"] == "http" else None
        await self.app(as_actor(scope, Actor(user.decode())) if user else scope, receive, send)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[Any]:
    """Open the bridge with the application: FastAPI does not tell what it mounts that it starts and stops."""
    async with bridge:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/ai", WhoIsIt(bridge))


@app.get("/metrics")
def metrics() -> Response:
    """What Prometheus scrapes."""
    return Response(generate_latest(registry), media_type="text/plain")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=8081)
