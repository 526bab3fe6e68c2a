"""An MCP server over stdio that answers what no SDK would, one line for one line. Its argument says what."""

import json
import os
import sys
import threading
import time
from typing import Any


def _storm() -> None:
    """Say all the time that the tools have changed."""
    while True:
        sys.stdout.write('{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}\n')
        sys.stdout.flush()
        time.sleep(0.02)


def _about(way: str) -> dict[str, Any]:
    if way == "storm":
        threading.Thread(target=_storm, daemon=True).start()
    return {
        "protocolVersion": "2025-06-18",
        "capabilities": {"tools": {"listChanged": way == "storm"}},
        "serverInfo": {"name": "raw\x1b[2J\nsecond  line" if way == "escapes" else "raw", "version": "0"},
    }


def _listed(way: str, page: int) -> dict[str, Any] | None:
    schema = {"type": "object"}
    match way:
        case "no-tools":
            return None
        case "endless":
            return {"tools": [], "nextCursor": f"{page}"}
        case "broken":
            return {"tools": "many"}
        case "storm":
            return {"tools": [{"name": f"t{page}", "inputSchema": schema}]}
        case "escapes":
            tool = {"name": "t\x1b[1A", "description": "One.\n\x07Two.", "inputSchema": schema}
            return {"tools": [tool, {"name": "bad\r", "inputSchema": {**schema, "not": {}}}]}
    good = {"name": "good", "inputSchema": schema}
    return {"tools": [good, {"name": "bad", "inputSchema": {"type": "string"}}, {"name": "worse"}]}


def _called(way: str) -> dict[str, Any]:
    if way in ("secret", "escapes"):
        said = f"401 for {os.environ.get('THE_KEY')}\x1b[2J\n\tthe end"
        return {"content": [{"type": "text", "text": said}], "isError": True}
    if way == "flood":
        return {"content": [{"type": "text", "text": "x" * 4_000_000}]}
    return {"content": [{"type": "video", "data": "x"}]}


def main(way: str) -> None:
    sys.stdout.write("Welcome!\n")
    page = 0
    for line in sys.stdin:
        asked = json.loads(line)
        found: dict[str, Any] | None = None
        match asked["method"]:
            case "initialize":
                found = _about(way)
            case "tools/list":
                page += 1
                found = _listed(way, page)
            case "tools/call":
                found = _called(way)
        if "id" in asked:
            error = {"code": -32601, "message": "Method not found"}
            answer = {"error": error} if found is None else {"result": found}
            sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **answer}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
