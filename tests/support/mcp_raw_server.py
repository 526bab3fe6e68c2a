"""An MCP server over stdio that answers what no SDK would, one line for one line. Its argument says what."""

import json
import sys
from typing import Any


def main(way: str) -> None:
    sys.stdout.write("Welcome!\n")
    page = 0
    for line in sys.stdin:
        asked = json.loads(line)
        found: dict[str, Any] | None = None
        match asked["method"]:
            case "initialize":
                version = {
                    "protocolVersion": "2025-06-18",
                    "capabilities": {},
                    "serverInfo": {"name": "raw", "version": "0"},
                }
                found = version
            case "tools/list" if way == "no-tools":
                found = None
            case "tools/list" if way == "endless":
                page += 1
                found = {"tools": [], "nextCursor": f"{page}"}
            case "tools/list" if way == "broken":
                found = {"tools": "many"}
            case "tools/list":
                good = {"name": "good", "inputSchema": {"type": "object"}}
                found = {"tools": [good, {"name": "bad", "inputSchema": {"type": "string"}}, {"name": "worse"}]}
            case "tools/call" if way == "flood":
                found = {"content": [{"type": "text", "text": "x" * 4_000_000}]}
            case "tools/call":
                found = {"content": [{"type": "video", "data": "x"}]}
        if "id" in asked:
            error = {"code": -32601, "message": "Method not found"}
            answer = {"error": error} if found is None else {"result": found}
            sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **answer}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
