"""The parts of a conversation in Anthropic Messages: the provider's, and the client's with Anthropic's SDK."""

import json
from collections.abc import Sequence
from typing import Any, Final

import anthropic

from .conversations import WEATHER, Asked, Call, Client, Entry, Hop, Speech, Tape, only_once, streamed
from .facts import Json
from .provider import Reply
from .turns_messages import Reply as Said, Said as Block, calls, says, thinks

MARK: Final[Any] = {"type": "ephemeral"}


class MessagesSpeech(Speech):
    conversation = "messages"
    constants = ("system", "tools")

    def said(self, hop: Hop, number: int) -> Any:
        return [json.loads(block.whole) for block in _blocks(hop, number)]

    def heard(self, body: Json) -> list[Entry]:
        entries: list[Entry] = []
        for message in body["messages"]:
            blocks = [unmarked(block) for block in message["content"]]
            if message["role"] == "assistant":
                entries.append(("model", blocks))
            elif blocks[0]["type"] == "tool_result":
                entries.append(("results", only_once([(block["tool_use_id"], told(block)) for block in blocks])))
            else:
                (block,) = blocks
                entries.append(("user", block["text"]))
        return entries

    def result(self, call: Call) -> Any:
        return call.result, call.fails

    def reply(self, hop: Hop, number: int, body: Json) -> Reply:
        said = Said(_blocks(hop, number), "tool_use" if hop.calls else "end_turn", number)
        return streamed(said.stream, number) if body.get("stream") else Reply.json(said.body)


def _blocks(hop: Hop, number: int) -> list[Block]:
    thought = [thinks(f"EqQBCkYIBxgCKkA-signed-{number}=", hop.thought)] if hop.thought else []
    words = [says(hop.words)] if hop.words else []
    return [*thought, *words, *(calls(call.id, call.name, call.arguments) for call in hop.calls)]


def unmarked(block: Json) -> Json:
    return {name: value for name, value in block.items() if name != "cache_control"}


def told(block: Json) -> tuple[str, bool]:
    content = block["content"]
    words = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return words, block.get("is_error", False)


class MessagesClient(Client):
    """Marks what may be cached as the vendor advises: tools, system, and the newest two messages, which move."""

    def __init__(self, session: str, tape: Tape) -> None:
        self.history: list[Any] = []
        self._sdk = anthropic.AsyncAnthropic(
            api_key="sk-ant-of-the-client",
            max_retries=0,
            default_headers={"x-session-id": session},
            http_client=anthropic.DefaultAsyncHttpxClient(transport=tape),
        )

    def say(self, prompt: str) -> None:
        self.history.append({"role": "user", "content": [{"type": "text", "text": prompt}]})

    def answer(self, results: Sequence[tuple[Asked, str]]) -> None:
        content = [{"type": "tool_result", "tool_use_id": asked.id, "content": words} for asked, words in results]
        self.history.append({"role": "user", "content": content})

    async def ask(self, url: str, *, stream: bool) -> list[Asked]:
        messages = self._sdk.with_options(base_url=f"{url}/anthropic").messages
        request: Any = {
            "model": "claude-opus-5-5",
            "max_tokens": 4096,
            "thinking": {"type": "adaptive"},
            "system": [{"type": "text", "text": "You help.", "cache_control": MARK}],
            "tools": [{"name": "weather", "description": "The weather.", "input_schema": WEATHER, "cache_control": MARK}],
            "messages": [*self.history[:-2], *map(_marked, self.history[-2:])],
        }
        if stream:
            async with messages.stream(**request) as events:
                message: Any = await events.get_final_message()
        else:
            message = await messages.create(**request)
        self.history.append({"role": "assistant", "content": message.content})
        return [Asked(block.id, block.name, block.input) for block in message.content if block.type == "tool_use"]

    async def close(self) -> None:
        await self._sdk.close()


def _marked(message: Json) -> Json:
    """The message with a mark on its last block; what is the SDK's is written as the SDK writes it."""
    *rest, last = message["content"]
    block = last if isinstance(last, dict) else last.to_dict()
    return {**message, "content": [*rest, {**block, "cache_control": MARK}]}
