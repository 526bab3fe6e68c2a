"""Claude Code itself, without a screen, in a home of its own, against whatever base URL it is given.

Installed by ``npm install`` in ``tests/clients`` (see the Makefile). Its package brings the native program of the
platform as an optional dependency, and an install script that puts it in place; npm may refuse to run scripts, so we
use the native program where it lies. It runs without Node. Node 22 is there for tests of JavaScript clients.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .provider import Received, Reply

CLIENTS = Path(__file__).parent.parent / "clients"
MODULES = CLIENTS / "node_modules"

KEY = "sk-ant-api03-test-key-of-claude-code"
MODEL = "claude-opus-5-5"


class NotInstalled(Exception):
    """The client is not there; the message says in plain words what is missing, and names no path of this machine."""


def claude() -> Path:
    """The native program of Claude Code. Raises NotInstalled."""
    return _native("Claude Code", "@anthropic-ai/claude-code-{}", "claude")


def node() -> Path:
    """Node 22. Raises NotInstalled."""
    return _native("Node 22", "node-{}", "bin/node")


def why_not(find: Callable[[], Path]) -> str:
    """Why a client cannot be driven here; empty when it can. For ``pytest.mark.skipif``."""
    try:
        find()
    except NotInstalled as reason:
        return str(reason)
    return ""


def _native(name: str, package: str, program: str) -> Path:
    if not MODULES.is_dir():
        raise NotInstalled(f"{name} is not installed: run `npm install --no-package-lock` in tests/clients")
    system = {"linux": "linux", "darwin": "darwin"}.get(sys.platform)
    machine = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}.get(platform.machine().lower())
    libc = "-musl" if system == "linux" and platform.libc_ver()[0] != "glibc" else ""
    for variant in (f"{system}-{machine}{libc}", f"{system}-{machine}"):
        path = MODULES / package.format(variant) / program
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise NotInstalled(f"{name} is not installed for {sys.platform} on {platform.machine()}: npm brought no such package")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one headless run came to. ``result`` is the JSON object that Claude Code prints at its end."""

    status: int
    result: Mapping[str, Any]
    stderr: str


def run(
    base_url: str,
    prompt: str,
    workspace: Path,
    *,
    key: str = KEY,
    env: Mapping[str, str] | None = None,
    seconds: float = 60,
    resume: str | None = None,
) -> Outcome:
    """Let Claude Code answer ``prompt`` in the directory ``workspace``. Raises NotInstalled, TimeoutError.

    ``base_url`` is what ANTHROPIC_BASE_URL shall be: the provider's origin, or the bridge's with its provider's path.
    The environment is made here and inherits nothing but PATH, so that neither the developer's own settings nor a
    proxy nor a credential finds its way into a test. ``resume`` goes on with the session of that id, if it is in the
    CLAUDE_CONFIG_DIR that ``env`` names.
    """
    program = claude()
    arguments = ["-p", prompt, "--dangerously-skip-permissions", "--output-format", "json"]
    if resume is not None:
        arguments += ["--resume", resume]
    with tempfile.TemporaryDirectory(prefix="claude-home-", ignore_cleanup_errors=True) as home:
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": home,
            "CLAUDE_CONFIG_DIR": f"{home}/.claude",
            "TMPDIR": home,
            "ANTHROPIC_BASE_URL": base_url,
            "ANTHROPIC_API_KEY": key,
            "ANTHROPIC_MODEL": MODEL,
            "IS_SANDBOX": "1",  # or it refuses to skip permissions as root
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            **(env or {}),
        }
        process = subprocess.Popen(
            [program, *arguments],
            cwd=workspace,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException as error:
            # With the shells it started, which hold its pipes; the group is certainly its own while it is not reaped.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=10)
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"Claude Code was still running after {seconds} s") from None
            raise
    return Outcome(process.returncode, _last_object(out), err.decode(errors="replace"))


def _last_object(out: bytes) -> Mapping[str, Any]:
    """The result object, be it alone or the last of a list as in verbose mode; empty when it printed none."""
    try:
        value = json.loads(out)
    except ValueError:
        return {}
    last = value[-1] if isinstance(value, list) and value else value
    return last if isinstance(last, dict) else {}


# --- a conversation of two turns --------------------------------------------------------------------------------------

TOOL_CALL_ID = "toolu_01ClaudeCodeDirect"
PROOF = "proof.txt"
COMMAND = f"printf written-by-the-tool > {PROOF} && printf seen-by-the-model"
FINAL_TEXT = "The file is written."
USAGES = ((1200, 41), (1300, 12))
"""Input and output tokens of the two turns that count; neither reads or writes a cache."""


@dataclass(slots=True)
class TwoTurns:
    """A provider's part of the conversation: first a call of Bash, and when its result is there, the final text.

    A handler and not a queue, because Claude Code asks for more than the conversation: a probe of the connection,
    a title, token counts. Those get a plausible answer and are not counted as turns.
    """

    turns: int = 0

    def __call__(self, received: Received) -> Reply:
        if received.method == "POST" and received.path.endswith("/v1/messages/count_tokens"):
            return Reply.json({"input_tokens": 1000})
        if received.method != "POST" or not received.path.endswith("/v1/messages"):
            return Reply.json({"type": "error", "error": {"type": "not_found_error", "message": "no"}}, 404)
        body = received.json()
        if not any(tool.get("name") == "Bash" for tool in body.get("tools", ())):
            return _stream("msg_aside", [_text("An aside")], "end_turn", (10, 3))
        self.turns += 1
        if tool_result(body) is None:
            call = {"type": "tool_use", "id": TOOL_CALL_ID, "name": "Bash", "input": {}}
            arguments = json.dumps({"command": COMMAND, "description": "Write a file"})
            middle = len(arguments) // 2
            deltas = [
                {"type": "input_json_delta", "partial_json": piece} for piece in ("", arguments[:middle], arguments[middle:])
            ]
            return _stream("msg_turn1", [_text("I write it."), (call, deltas)], "tool_use", USAGES[0])
        return _stream("msg_turn2", [_text(FINAL_TEXT)], "end_turn", USAGES[1])


def tool_result(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The result of our call, wherever in the request it stands; None in a first turn."""
    for message in body["messages"]:
        if isinstance(message["content"], list):
            for block in message["content"]:
                if block.get("type") == "tool_result" and block.get("tool_use_id") == TOOL_CALL_ID:
                    found: Mapping[str, Any] = block
                    return found
    return None


Block = tuple[dict[str, Any], list[dict[str, Any]]]


def _text(text: str) -> Block:
    return {"type": "text", "text": ""}, [{"type": "text_delta", "text": text}]


def _stream(message_id: str, blocks: list[Block], stop_reason: str, tokens: tuple[int, int]) -> Reply:
    """A Messages stream, one event a step."""
    zeros = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    message: dict[str, Any] = {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": tokens[0], **zeros, "output_tokens": 1},
    }
    events: list[dict[str, Any]] = [{"type": "message_start", "message": message}, {"type": "ping"}]
    for index, (block, deltas) in enumerate(blocks):
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        events += ({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas)
        events.append({"type": "content_block_stop", "index": index})
    events += (
        {
            "type": "message_delta",
            "delta": {"stop_reason": stop_reason, "stop_sequence": None},
            "usage": {"output_tokens": tokens[1]},
        },
        {"type": "message_stop"},
    )
    steps = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]
    return Reply.stream(steps, headers=[("request-id", f"req_{message_id}")])
