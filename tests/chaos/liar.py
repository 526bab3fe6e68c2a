"""An MCP server over stdio that lies. Its first argument says how, the second how much. It needs nothing but Python."""

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final

TOOL: Final = "tell"
_SCHEMA: Final = {"type": "object"}


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def result(words: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": words}]}


def tools(way: str, much: int) -> list[dict[str, Any]]:
    good = {"name": TOOL, "description": "Tells the truth.", "inputSchema": _SCHEMA}
    match way:
        case "million":
            return [good, *({"name": f"{TOOL}-{number}", "inputSchema": _SCHEMA} for number in range(much))]
        case "bombs":
            return [good, *({"name": f"bomb-{n}", "inputSchema": bomb} for n, bomb in enumerate(bombs(much)))]
        case "changed":  # it is another one now, and the old one is gone
            return [{**good, "name": "confess"}]
    return [good]


def bombs(much: int) -> Iterator[dict[str, Any]]:
    """Schemas that cost whoever looks into them: deep, wide, circular, doubling, with an evil pattern."""
    deep: dict[str, Any] = {}
    for _ in range(60):
        deep = {"properties": {"a": deep}}
    yield {**_SCHEMA, **deep}
    yield {**_SCHEMA, "properties": {f"a{number}": {"type": "string"} for number in range(much)}}
    yield {**_SCHEMA, "properties": {"a": {"$ref": "#"}}, "$defs": {"b": {"$ref": "#/$defs/b"}}}
    doubling = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(64)}
    yield {**_SCHEMA, "properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": doubling}
    yield {**_SCHEMA, "properties": {"a": {"type": "string", "pattern": "(a+)+$", "default": "a" * 64}}}


class Liar:
    """One session."""

    def __init__(self, way: str, much: int) -> None:
        self._way = way
        self._much = much

    def hear(self, message: dict[str, Any]) -> None:
        if "id" not in message:
            return
        match message["method"]:
            case "initialize":
                about = {"tools": {"listChanged": True}}
                server = {"name": "liar", "version": "0"}
                self._answer(message, {"protocolVersion": "2025-06-18", "capabilities": about, "serverInfo": server})
            case "tools/list" if self._way == "abyss":
                deep = '{"a":' * self._much + "1" + "}" * self._much
                sys.stdout.write(f'{{"jsonrpc":"2.0","id":{message["id"]},"result":{{"tools":[{deep}]}}}}\n')
                sys.stdout.flush()
            case "tools/list":
                self._answer(message, {"tools": tools(self._way, self._much)})
            case "tools/call":
                self._call(message)
            case _:
                say({"id": message["id"], "error": {"code": -32601, "message": "Method not found"}})

    def _answer(self, message: dict[str, Any], found: dict[str, Any]) -> None:
        say({"id": message["id"], "result": found})

    def _call(self, message: dict[str, Any]) -> None:
        match self._way:
            case "denies":
                say({"id": message["id"], "error": {"code": -32602, "message": f"Unknown tool: {TOOL}"}})
            case "wrong-id":
                say({"id": message["id"] + 1000, "result": result("for another")})
            case "twice":
                self._answer(message, result("the first answer"))
                self._answer(message, result("the second answer"))
            case "huge":
                self._answer(message, result("x" * (self._much * 2**20)))
            case "late":
                threading.Timer(2.5, self._answer, (message, result("too late"))).start()
            case "closes":
                sys.exit(3)
            case "babbles":
                sys.stdout.write("Segmentation fault (core dumped)\n{}\n[]\nnull\n" * 100)
                say({"id": message["id"], "result": "no result at all"})
            case "changes":
                self._way = "changed"
                say({"method": "notifications/tools/list_changed"})
                self._answer(message, result("the truth"))
            case "changed":
                say({"id": message["id"], "error": {"code": -32602, "message": f"Unknown tool: {TOOL}"}})
            case "million" | "bombs" | "honest":
                self._answer(message, result("the truth"))
            case "silent":
                pass


def main(way: str, much: int) -> None:
    liar = Liar(way, much)
    for line in sys.stdin:
        liar.hear(json.loads(line))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
