"""Arrows point down only, and the core is pure.

Truth: design.md 2 (direction of the arrows, purity of the core), style.md habits 1 and 11; the order of the layers is ours
and stands here once. Imports inside functions and for type checkers count: an arrow is an arrow.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import aibridge

ROOT = Path(aibridge.__file__).parent

# From top to bottom. A module may import what stands below it; modules on one line do not know each other.
LAYERS = [
    # the server: an application of the library
    ["aibridge.__main__"],
    ["aibridge.cli"],
    ["aibridge.check", "aibridge.demo", "aibridge.replay", "aibridge.tooling"],
    ["aibridge.supervisor"],
    ["aibridge.worker"],
    ["aibridge.process"],
    ["aibridge.reloading", "aibridge.server"],
    ["aibridge.config"],
    ["aibridge.settings"],
    ["aibridge.httpserver", "aibridge.multiprocess", "aibridge.systemd"],
    ["aibridge.httpprotocol"],
    ["aibridge.httpexchange"],
    # the library
    ["aibridge"],
    ["aibridge.bridge"],
    ["aibridge.generation"],
    # the shell: moves bytes, owns clocks and sockets
    ["aibridge.sampler"],
    ["aibridge.dumps", "aibridge.otlp"],
    ["aibridge.dumpfiles", "aibridge.dumpfolder"],
    ["aibridge.logs", "aibridge.metrics", "aibridge.passthrough", "aibridge.relay", "aibridge.tracing"],
    ["aibridge.metrics.interceptions", "aibridge.metrics.recording", "aibridge.metrics.upstream"],
    ["aibridge.metrics.series"],
    ["aibridge.loglines", "aibridge.logwriter"],
    ["aibridge.calling"],
    ["aibridge.sidecalls"],
    ["aibridge.injection", "aibridge.ledger"],
    ["aibridge.recording"],
    ["aibridge.recording.approvals", "aibridge.recording.history", "aibridge.recording.sqlite"],
    ["aibridge.recording.writer"],
    ["aibridge.recording.schema", "aibridge.recording.spool"],
    ["aibridge.recording.base"],
    ["aibridge.mcp"],
    ["aibridge.mcp.proxy"],
    ["aibridge.mcp.catalog", "aibridge.mcp.servers"],
    ["aibridge.mcp.transports"],
    ["aibridge.mcp.approvals", "aibridge.mcp.content", "aibridge.mcp.settings", "aibridge.mcp.stdio"],
    ["aibridge.httpclient"],
    ["aibridge.httpconnection"],
    ["aibridge.history", "aibridge.toolbox"],
    ["aibridge.guard", "aibridge.headers", "aibridge.identity", "aibridge.providers", "aibridge.upstream"],
    [
        "aibridge.asgi",
        "aibridge.deadlines",
        "aibridge.interruptible",
        "aibridge.keepalive",
        "aibridge.masking",
        "aibridge.unread",
        "aibridge.upstreamerrors",
    ],
    ["aibridge.spans"],
    ["aibridge.events", "aibridge.otelenv"],
    # the core
    ["aibridge.conversation"],
    ["aibridge.merger"],
    ["aibridge.commands"],
    ["aibridge.clients", "aibridge.records"],
    ["aibridge.wire"],
    ["aibridge.wire.responses"],
    ["aibridge.wire.chat", "aibridge.wire.messages", "aibridge.wire.observer"],
    ["aibridge.wire.base"],
    ["aibridge.wire.chat_turns", "aibridge.wire.messages_turns", "aibridge.wire.responses_turns"],
    ["aibridge.wire.messages_history", "aibridge.wire.responses_history"],
    ["aibridge.wire.chat_merging", "aibridge.wire.messages_merging", "aibridge.wire.responses_merging"],
    ["aibridge.wire.chat_assembly"],
    ["aibridge.wire.usage"],
    ["aibridge.wire.turns"],
    ["aibridge.wire.coding", "aibridge.wire.credentials", "aibridge.wire.splicing", "aibridge.wire.sse"],
    ["aibridge.wire.reading"],
    ["aibridge.breakers", "aibridge.limits", "aibridge.retries", "aibridge.summaries"],
    ["aibridge.errors", "aibridge.tools"],
]

DEPTH = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}

CORE = [module for module in DEPTH if DEPTH[module] >= DEPTH["aibridge.conversation"]]

# All that the core takes from elsewhere. Nothing here waits, reads a clock, logs, or knows the system it runs on.
PURE = {
    "abc",
    "brotli",
    "collections.abc",
    "contextlib",
    "dataclasses",
    "email.utils",  # for dates, which it reads without a clock
    "functools",
    "hashlib",
    "datetime",  # as a type: see below
    "itertools",
    "importlib",  # for zstd, which is not in the same place in all versions of Python
    "json",
    "math",
    "msgspec",
    "re",
    "sys",  # for its version
    "typing",
    "zlib",
}

BUILTINS_WITH_EFFECTS = {"open", "print", "input", "exec", "eval", "compile", "breakpoint", "__import__"}
CLOCKS = {"now", "utcnow", "today"}


def sources() -> dict[str, Path]:
    """The modules of the package. Migrations are no part of it: alembic loads them by path."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "migrations" not in parts:
            found[".".join(["aibridge", *parts]).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "a relative import"
            assert node.level == 0, "a relative import"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (member if member in SOURCES else node.module for member in members)


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "aibridge"


def test_every_module_has_its_place() -> None:
    assert sorted(DEPTH) == sorted(SOURCES)
    assert sum(map(len, LAYERS)) == len(DEPTH)


@pytest.mark.parametrize("module", sorted(DEPTH))
def test_arrows_point_down(module: str) -> None:
    """Which leaves no room for a cycle either."""
    upward = [imported for imported in imports(module) if is_ours(imported) and DEPTH[imported] <= DEPTH[module]]
    assert upward == []


@pytest.mark.parametrize("module", CORE)
def test_the_core_takes_nothing_impure(module: str) -> None:
    foreign = {imported for imported in imports(module) if not is_ours(imported)}
    assert foreign <= PURE
    if module != "aibridge.records":
        assert "datetime" not in foreign


@pytest.mark.parametrize("module", CORE)
def test_the_core_never_waits_and_has_no_effects(module: str) -> None:
    for node in ast.walk(tree(module)):
        assert not isinstance(node, ast.Await | ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith)
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in BUILTINS_WITH_EFFECTS)
        assert not (isinstance(node, ast.Attribute) and node.attr in CLOCKS)
        assert not isinstance(node, ast.Global)


def test_the_core_is_what_coverage_is_demanded_of() -> None:
    """The Makefile's list, which cannot ask us."""
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    (line,) = [line for line in makefile.splitlines() if line.startswith("CORE = ")]
    listed = [Path(pattern) for pattern in line.removeprefix("CORE = ").split(",")]
    for module in CORE:
        path = Path("src") / SOURCES[module].relative_to(ROOT.parent)
        assert any(path.match(str(pattern)) for pattern in listed)
