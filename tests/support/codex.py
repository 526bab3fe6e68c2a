"""Codex itself, without a screen, in a home of its own, against whatever base URL it is given; and what to answer it.

Installed by ``npm install`` in ``tests/clients`` (see the Makefile). Its package brings the native program of the platform
as an optional dependency; it runs without Node.
"""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .claude_code import MODULES, NotInstalled
from .provider import Reply

KEY: Final = "sk-proj-test-key-of-codex"
GPT_5: Final = "gpt-5.5"
"""A model to which Codex offers functions of its own, in ``tools``."""
GPT_6: Final = "gpt-6.1-sol"
"""A model to which it offers a custom tool that runs programs, in a namespace of its first input item, which is of type
``additional_tools``; the request has no ``tools`` (seen on 2026-11-22)."""

Item = dict[str, Any]


def codex() -> Path:
    """The native program of Codex. Raises NotInstalled."""
    for path in MODULES.glob("@openai/codex-*/vendor/*/bin/codex"):  # npm installs that of this platform only
        if os.access(path, os.X_OK):
            return path
    raise NotInstalled("Codex is not installed: run `npm install --no-package-lock` in tests/clients")


# --- the client -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one headless run came to. ``events`` are the JSON objects that Codex prints, one a line."""

    status: int
    events: Sequence[Mapping[str, Any]]
    stderr: str

    @property
    def session(self) -> str:
        """The session's id, as Codex sends it in its header ``session-id``."""
        return str(self._only("thread.started")["thread_id"])

    @property
    def usage(self) -> Mapping[str, int]:
        """What Codex believes to have used, all requests together."""
        usage: Mapping[str, int] = self._only("turn.completed")["usage"]
        return usage

    def items(self, type: str) -> list[Mapping[str, Any]]:
        """What Codex said and did, of one type: ``agent_message``, ``command_execution``, ``error``."""
        ended = [event["item"] for event in self.events if event["type"] == "item.completed"]
        return [item for item in ended if item["type"] == type]

    def _only(self, type: str) -> Mapping[str, Any]:
        (event,) = (event for event in self.events if event["type"] == type)
        return event


_CONFIG: Final = """\
model = {model}
model_provider = "gw"
check_for_update_on_startup = false

[analytics]
enabled = false

[model_providers.gw]
name = "gw"
base_url = {base_url}
env_key = "GW_KEY"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
stream_idle_timeout_ms = 30000
"""

_ARGUMENTS: Final = ("exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")


def run(
    base_url: str,
    prompt: str,
    workspace: Path,
    *,
    model: str = GPT_5,
    key: str = KEY,
    seconds: float = 60,
    home: Path | None = None,
    resume: str | None = None,
) -> Outcome:
    """Let Codex answer ``prompt`` in the directory ``workspace``; it does not retry. Raises NotInstalled, TimeoutError.

    ``base_url`` is where ``/responses`` is: the provider's ``/v1``, or the bridge's ``/openai/v1``. The environment is made
    here and inherits nothing but PATH; what Codex asks of its vendor beside, over TLS, goes to a proxy that is not there.
    ``resume`` goes on with the session of that id, which was in the same ``home``.
    """
    program = codex()
    going_on = [] if resume is None else ["resume", resume]
    with _home(home) as folder:
        # A JSON string is a TOML string.
        config = _CONFIG.format(model=json.dumps(model), base_url=json.dumps(base_url))
        Path(folder, "config.toml").write_text(config)
        process = subprocess.Popen(
            [program, *_ARGUMENTS, *going_on, prompt],
            cwd=workspace,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": folder,
                "CODEX_HOME": folder,
                "TMPDIR": folder,
                "HTTPS_PROXY": "http://127.0.0.1:9",
                "GW_KEY": key,
            },
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
                raise TimeoutError(f"Codex was still running after {seconds} s") from None
            raise
    return Outcome(process.returncode, [json.loads(line) for line in out.splitlines()], err.decode(errors="replace"))


@contextmanager
def _home(home: Path | None) -> Iterator[str]:
    """The folder that is given, or one for this time."""
    if home is not None:
        yield str(home)
    else:
        with tempfile.TemporaryDirectory(prefix="codex-home-", ignore_cleanup_errors=True) as folder:
            yield folder


# --- what a provider says to it ---------------------------------------------------------------------------------------


def message(id: str, text: str) -> Item:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"id": id, "type": "message", "status": "completed", "role": "assistant", "content": content}


def reasoning(id: str, encrypted_content: str) -> Item:
    """A thought without a summary, which a client replays as it is."""
    return {"id": id, "type": "reasoning", "summary": [], "encrypted_content": encrypted_content}


def function_call(id: str, call_id: str, name: str, arguments: Mapping[str, Any]) -> Item:
    return {
        "id": id,
        "type": "function_call",
        "status": "completed",
        "call_id": call_id,
        "name": name,
        "arguments": json.dumps(arguments),
    }


def custom_tool_call(id: str, call_id: str, name: str, input: str, *, namespace: str) -> Item:
    return {
        "id": id,
        "type": "custom_tool_call",
        "status": "completed",
        "call_id": call_id,
        "namespace": namespace,
        "name": name,
        "input": input,
    }


def says(response_id: str, *items: Item, tokens: tuple[int, int], model: str = GPT_5) -> Reply:
    """A provider's stream that says these items and has used these input and output tokens; one event a step."""

    def response(status: str, output: Sequence[Item], usage: Item | None) -> Item:
        told = {"id": response_id, "object": "response", "created_at": 1795219200, "model": model}
        return {"response": told | {"status": status, "output": output, "usage": usage}}

    started = response("in_progress", [], None)
    events: list[tuple[str, Item]] = [("response.created", started), ("response.in_progress", started)]
    for index, item in enumerate(items):
        place = {"output_index": index}
        bare = {key: type(value)() for key, value in item.items() if key in ("content", "arguments", "input")}
        unfinished = {"status": "in_progress"} if "status" in item else {}
        events.append(("response.output_item.added", place | {"item": item | bare | unfinished}))
        events += ((kind, place | {"item_id": item["id"]} | members) for kind, members in _deltas(item))
        events.append(("response.output_item.done", place | {"item": item}))
    usage = {
        "input_tokens": tokens[0],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": tokens[1],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": sum(tokens),
    }
    events.append(("response.completed", response("completed", items, usage)))
    steps = [
        f"event: {kind}\ndata: {json.dumps({'type': kind, 'sequence_number': number} | members)}\n\n".encode()
        for number, (kind, members) in enumerate(events)
    ]
    return Reply.stream(steps, headers=[("x-request-id", f"req_{response_id}")])


def _deltas(item: Item) -> list[tuple[str, Item]]:
    """What stands between an item's added and done events: its text in two pieces, then whole."""
    match item:
        case {"type": "function_call", "arguments": text}:
            return _halves("response.function_call_arguments", text, {"arguments": text})
        case {"type": "custom_tool_call", "input": text}:
            return _halves("response.custom_tool_call_input", text, {"input": text})
        case {"type": "message", "content": [{"text": text} as part]}:
            place = {"content_index": 0}
            moves = _halves("response.output_text", text, {"text": text})
            return [
                ("response.content_part.added", place | {"part": part | {"text": ""}}),
                *((kind, place | {"logprobs": []} | members) for kind, members in moves),
                ("response.content_part.done", place | {"part": part}),
            ]
        case _:
            return []


def _halves(kind: str, text: str, whole: Item) -> list[tuple[str, Item]]:
    middle = len(text) // 2
    return [
        (f"{kind}.delta", {"delta": text[:middle]}),
        (f"{kind}.delta", {"delta": text[middle:]}),
        (f"{kind}.done", whole),
    ]


# --- a conversation of two turns --------------------------------------------------------------------------------------

TOOL_CALL_ID: Final = "call_CodexOwnTool"
PROOF: Final = "proof.txt"
COMMAND: Final = f"printf written-by-the-tool > {PROOF} && printf seen-by-the-model"
THOUGHT: Final = "gAAAAABpIcodexthought"
FINAL_TEXT: Final = "The file is written."
USAGES: Final = ((1200, 41), (1300, 12))
"""Input and output tokens of the two turns."""

_PROGRAM: Final = f"text(await tools.exec_command({json.dumps({'cmd': COMMAND})}));"

SHELL_CALLS: Final[Mapping[str, Item]] = {
    GPT_5: function_call("fc_codex", TOOL_CALL_ID, "exec_command", {"cmd": COMMAND}),
    GPT_6: custom_tool_call("ctc_codex", TOOL_CALL_ID, "exec", _PROGRAM, namespace="functions"),
}
"""How a model runs the command."""


def calls_the_shell(model: str = GPT_5) -> Reply:
    """A first turn: a thought, a word to the user, a call of Codex's own tool."""
    items = reasoning("rs_codex", THOUGHT), message("msg_turn1", "I write it."), SHELL_CALLS[model]
    return says("resp_turn1", *items, tokens=USAGES[0], model=model)


def ends(model: str = GPT_5) -> Reply:
    """The last turn: the final text."""
    return says("resp_turn2", message("msg_turn2", FINAL_TEXT), tokens=USAGES[1], model=model)
