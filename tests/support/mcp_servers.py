"""Real MCP servers for tests: processes on loopback, or commands on standard streams.

- ``sdk``: the `mcp` SDK's low-level server, which says exactly what we want. It speaks 2026-07-28 and, by handshake, what
  was before; with ``legacy`` behind it the former is refused, as servers do that do not know it (clients.md 6). With
  ``guarded`` it wants the `SECRET` in all the places where one can be. It lists in random order, in pages, with the keys of
  schemas shuffled.
- ``fastmcp``: a server as people write them.
- ``raw``: one that answers what no SDK would, over stdio only.

The ways are ``http`` (streamable HTTP), ``sse`` and ``stdio``. The reference server of the npm package *everything* is
driven with Node; a preload keeps it on loopback, since it would bind all interfaces.
"""

import asyncio
import base64
import multiprocessing
import multiprocessing.process
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Self

import mcp_types as types
import uvicorn
from mcp.server import Server
from mcp.server.context import ServerRequestContext
from mcp.server.sse import SseServerTransport
from mcp.server.stdio import stdio_server
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler
from mcp.shared.subscriptions import ToolsListChanged
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .claude_code import MODULES, NotInstalled, node

START_SECONDS: Final = 30.0
PIXEL: Final = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SOUND: Final = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAESsAABErAAABAAgAZGF0YQAAAAA="

SECRET: Final = "hunter2-and-more"

_LISTENING: Final = b"listening on "


class Process:
    """A server process on loopback. `port` is the same when it is started again."""

    def __init__(self, path: str, port: int = 0) -> None:
        self._path = path
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self._path}"

    def start(self) -> None:
        """Start it and wait until it listens."""
        raise NotImplementedError

    def kill(self) -> None:
        """End it at once."""
        raise NotImplementedError

    def restart(self) -> None:
        """Another process at the same address, which knows nothing of the first one's sessions."""
        self.kill()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


# Importing the SDK takes about as long as a test: a process that has done it makes the others.
_forks: Final = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


class _Forked(Process):
    """A server of ours."""

    def __init__(self, kind: str, way: str, options: tuple[str, ...], port: int) -> None:
        super().__init__("/sse" if way == "sse" else "/mcp", port)
        self._arguments = (kind, way, options)
        self._process: multiprocessing.process.BaseProcess | None = None

    def start(self) -> None:
        ours, theirs = _forks.Pipe()
        with ours, theirs:
            process = _forks.Process(target=_serve, args=(*self._arguments, self.port, theirs), daemon=True)
            process.start()
            self._process = process
            if not ours.poll(START_SECONDS):
                raise RuntimeError("the server did not start")
            self.port = ours.recv()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(START_SECONDS)
            self._process.close()
            self._process = None


class _Node(Process):
    """The reference server, which a preload has tell where it listens."""

    def __init__(self, way: str, preload: Path) -> None:
        super().__init__("/sse" if way == "sse" else "/mcp")
        option = "sse" if way == "sse" else "streamableHttp"
        self._command = [str(node()), "--require", str(preload), str(everything()), option]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = {**os.environ, "PORT": str(self.port)}
        process = subprocess.Popen(self._command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process = process
        watchdog = threading.Timer(START_SECONDS, process.kill)  # so that its output ends
        watchdog.start()
        assert process.stdout is not None
        told = next((line for line in process.stdout if line.startswith(_LISTENING)), None)
        watchdog.cancel()
        if told is None:
            raise RuntimeError("the server did not start")
        self.port = int(told.split()[-1])

    def kill(self) -> None:
        if self._process is not None:
            assert self._process.stdout is not None
            self._process.kill()
            self._process.wait(START_SECONDS)
            self._process.stdout.close()
            self._process = None


def server(kind: str, way: str, *options: str, port: int = 0) -> Process:
    """A server of ours over HTTP."""
    return _Forked(kind, way, options, port)


def command(kind: str, *options: str) -> list[str]:
    """The command line of a server of ours over stdio."""
    if kind == "raw":
        return [sys.executable, str(Path(__file__).with_name("mcp_raw_server.py")), *options]
    return [sys.executable, "-m", __name__, kind]


# ---- the reference server ----

_ON_LOOPBACK: Final = """\
const net = require("node:net");
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (port) {
  this.once("listening", () => console.log("listening on " + this.address().port));
  return listen.call(this, { port: Number(port), host: "127.0.0.1" });
};
"""


def everything() -> Path:
    """The reference server's program. Raises NotInstalled."""
    program = MODULES / "@modelcontextprotocol/server-everything/dist/index.js"
    if not program.is_file():
        raise NotInstalled("The reference MCP server is not installed: run `npm install --no-package-lock` in tests/clients")
    return program


@contextmanager
def everything_server(way: str) -> Iterator[Process]:
    """The reference server over HTTP, on loopback."""
    with tempfile.TemporaryDirectory() as folder:
        preload = Path(folder) / "loopback.cjs"
        preload.write_text(_ON_LOOPBACK, encoding="utf-8")
        with _Node(way, preload) as process:
            yield process


# ---- the server on the SDK ----


def _tool(name: str, properties: dict[str, Any] | None = None, **more: Any) -> types.Tool:
    """A tool, its schema written in another order each time."""
    schema = [("type", "object"), ("properties", _shuffled(properties or {})), ("required", sorted(properties or {}))]
    random.shuffle(schema)
    return types.Tool(name=name, description=f"The tool {name}.", input_schema=dict(schema), **more)


def _shuffled(found: dict[str, Any]) -> dict[str, Any]:
    return dict(random.sample(sorted(found.items()), len(found)))


_READ_ONLY: Final = types.ToolAnnotations(read_only_hint=True)
_NUMBERS: Final = {"a": {"type": "integer", "title": "A"}, "b": {"title": "B", "type": "integer"}}


class Sdk:
    """A server on the SDK's low-level classes."""

    def __init__(self) -> None:
        self.bus = InMemorySubscriptionBus()
        self.extra: list[str] = ["disappearing"]
        self.description: str | None = None
        self.running = self.most = 0
        self.server: Server[Any] = Server(
            "sdk",
            version="1.2.3",
            on_list_tools=self.list_tools,
            on_call_tool=self.call_tool,
            on_subscriptions_listen=ListenHandler(self.bus),
        )

    def listed(self) -> list[types.Tool]:
        add = _tool("add", _NUMBERS, annotations=_READ_ONLY)
        add.description = self.description or add.description
        tools = [add, _tool("fail", annotations=_READ_ONLY), _tool("slow", {"seconds": {"type": "number"}}), _tool("never")]
        tools += [_tool("big", {"size": {"type": "integer"}}), _tool("media"), _tool("empty"), _tool("structured")]
        tools += [_tool("odd.name/with:chars"), _tool("odd_name/with:chars"), _tool("environment"), _tool("ask")]
        tools += [_tool("say", {"what": {"type": "string"}}), _tool("change"), _tool("running"), _tool("die")]
        tools += [_tool("long" + "-and-longer" * 8), *map(_tool, self.extra)]
        tools.append(types.Tool(name="either", input_schema={"type": "object", "anyOf": [{"required": ["a"]}]}))
        return random.sample(tools, len(tools))

    async def list_tools(
        self, context: ServerRequestContext[Any], params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        """In pages: the rest is kept under the cursor."""
        tools = pages.pop(params.cursor) if params and params.cursor else self.listed()
        size = random.randint(3, 9)
        if len(tools) <= size:
            return types.ListToolsResult(tools=tools)
        cursor = f"{random.getrandbits(64):x}"
        pages[cursor] = tools[size:]
        return types.ListToolsResult(tools=tools[:size], next_cursor=cursor)

    async def call_tool(
        self, context: ServerRequestContext[Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult | types.InputRequiredResult:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            run = getattr(self, f"run_{params.name}", None)
            found = f"called {params.name}" if run is None else await run(context, **params.arguments or {})
        finally:
            self.running -= 1
        return _text(found) if isinstance(found, str) else found

    async def run_add(self, context: Any, a: int, b: int) -> str:
        return str(a + b)

    async def run_fail(self, context: Any) -> types.CallToolResult:
        return types.CallToolResult(content=[types.TextContent(text="It went wrong.")], is_error=True)

    async def run_slow(self, context: Any, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    async def run_never(self, context: Any) -> str:
        await asyncio.Event().wait()
        return "never"

    async def run_big(self, context: Any, size: int) -> str:
        return "x" * size

    async def run_media(self, context: Any) -> types.CallToolResult:
        return types.CallToolResult(content=_media())

    async def run_empty(self, context: Any) -> types.CallToolResult:
        return types.CallToolResult(content=[])

    async def run_structured(self, context: Any) -> types.CallToolResult:
        return types.CallToolResult(content=[], structured_content={"n": 1})

    async def run_environment(self, context: Any) -> str:
        return " ".join(sorted(os.environ))

    async def run_ask(self, context: Any) -> types.InputRequiredResult:
        return types.InputRequiredResult(request_state="x")

    async def run_say(self, context: Any, what: str) -> str:
        sys.stderr.write(what + "\n")
        sys.stderr.flush()
        return "said"

    async def run_running(self, context: Any) -> str:
        """How many calls run now beside this one, and how many have run at most."""
        return f"{self.running - 1} {self.most}"

    async def run_die(self, context: Any) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return "dead"

    async def run_change(self, context: ServerRequestContext[Any]) -> str:
        self.extra, self.description = ["appearing"], "Another description."
        await self.bus.publish(ToolsListChanged())
        await context.session.send_tool_list_changed()
        return "changed"


pages: dict[str, list[types.Tool]] = {}


def _text(text: str) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(text=text)])


def _media() -> list[types.ContentBlock]:
    return [
        types.TextContent(text="All kinds:"),
        types.ImageContent(data=PIXEL, mime_type="image/png"),
        types.AudioContent(data=SOUND, mime_type="audio/wav"),
        types.EmbeddedResource(resource=types.TextResourceContents(uri="note://1", text="A note.", mime_type="text/plain")),
        types.EmbeddedResource(
            resource=types.BlobResourceContents(uri="file:///a.zip", blob="UEsFBg==", mime_type="application/zip")
        ),
        types.ResourceLink(name="manual", uri="docs://manual", description="How it works."),
    ]


# ---- the server on fastmcp ----


def _fastmcp() -> Any:
    from fastmcp import Context, FastMCP
    from fastmcp.utilities.types import Image

    server = FastMCP("fast", version="4.5.6")

    async def grow(context: Context) -> str:
        server.add_tool(server_tool("grown"))
        return "grown"

    def server_tool(name: str) -> Any:
        from fastmcp.tools import Tool

        def grown() -> str:
            return name

        return Tool.from_function(grown, name=name)

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    def fail() -> str:
        """Fail."""
        raise RuntimeError("It went wrong.")

    def weather(city: str) -> dict[str, Any]:
        """Tell the weather."""
        return {"city": city, "degrees": 21}

    def cities() -> list[str]:
        """List cities."""
        return ["Bern", "Oslo"]

    def picture() -> Image:
        """Show a picture."""
        return Image(data=base64.b64decode(PIXEL), format="png")

    async def slow(seconds: float) -> str:
        """Take time."""
        await asyncio.sleep(seconds)
        return "done"

    functions: list[Any] = [add, fail, weather, cities, picture, slow, grow]
    for function in random.sample(functions, len(functions)):
        server.tool(function)
    return server


# ---- the process ----


def _refusing_2026(app: ASGIApp) -> ASGIApp:
    """The application as a server that does not know 2026-07-28."""

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and dict(scope["headers"]).get(b"mcp-method") == b"server/discover":
            await Response("Bad Request: Server not initialized", 400)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return served


def _guarded(app: ASGIApp) -> ASGIApp:
    """The application for those who know the secret."""

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            user = base64.b64encode(f"me:{SECRET}".encode()).decode()
            known = request.headers.get("x-api-key") == SECRET == request.query_params.get("key")
            if not known or request.headers.get("authorization") != f"Basic {user}":
                await Response("Who are you?", 401)(scope, receive, send)
                return
        await app(scope, receive, send)

    return served


def _sse(server: Server[Any]) -> Starlette:
    transport = SseServerTransport("/messages/")

    async def connect(request: Request) -> Response:
        async with transport.connect_sse(request.scope, request.receive, request._send) as streams:
            await server.run(streams[0], streams[1], server.create_initialization_options())
        return Response()

    return Starlette(routes=[Route("/sse", connect), Mount("/messages/", app=transport.handle_post_message)])


def _application(kind: str, way: str, options: tuple[str, ...]) -> ASGIApp:
    if kind == "fastmcp":
        fast: ASGIApp = _fastmcp().http_app(path="/mcp")
        return fast
    if way == "sse":
        return _sse(Sdk().server)
    app: ASGIApp = Sdk().server.streamable_http_app(json_response="json" in options)
    app = _refusing_2026(app) if "legacy" in options else app
    return _guarded(app) if "guarded" in options else app


def _serve(kind: str, way: str, options: tuple[str, ...], port: int, told: Connection) -> None:
    """The life of a forked process."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        app = _application(kind, way, options)
        told.send(listening.getsockname()[1])
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


async def _run_stdio(server: Server[Any]) -> None:
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


if __name__ == "__main__":
    if sys.argv[1] == "fastmcp":
        _fastmcp().run("stdio", show_banner=False)
    else:
        asyncio.run(_run_stdio(Sdk().server))
