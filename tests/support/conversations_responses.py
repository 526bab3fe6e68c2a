"""The parts of a conversation in the Responses protocol: the provider's, and the client's with OpenAI's SDK.

Either the client repeats everything, encrypted reasoning too, or it names the response before and the provider remembers the
rest (wire.md C5).
"""

import json
from collections.abc import Sequence
from typing import Any

import openai

from .conversations import WEATHER, Asked, Client, Entry, Hop, Speech, Tape, only_once, streamed
from .facts import Json
from .provider import Reply
from .turns_responses import Reply as Said, call as function_call, message as spoken, reasoning


class ResponsesSpeech(Speech):
    conversation = "input"
    constants = ("instructions", "tools")

    def __init__(self) -> None:
        self.kept: dict[str, list[Json]] = {}
        """What the provider remembers: conversations up to and with a response, by its id."""

    def said(self, hop: Hop, number: int) -> Any:
        return [_heard(item) for item in _items(hop, number)]

    def heard(self, body: Json) -> list[Entry]:
        entries: list[Entry] = []
        for item in self._whole(body):
            if item.get("role") == "user":
                entries.append(("user", item["content"]))
                continue
            is_result = item["type"] == "function_call_output"
            kind, piece = ("results", (item["call_id"], item["output"])) if is_result else ("model", _heard(item))
            if entries[-1][0] != kind:
                entries.append((kind, []))
            entries[-1][1].append(piece)
        return [(kind, only_once(said) if kind == "results" else said) for kind, said in entries]

    def reply(self, hop: Hop, number: int, body: Json) -> Reply:
        items = _items(hop, number)
        said = Said(f"resp_{number}", items, previous=body.get("previous_response_id"), tools=body["tools"])
        self.kept[said.id] = [*self._whole(body), *items]
        return streamed(said.stream(), number) if body.get("stream") else Reply.json(said.body())

    def _whole(self, body: Json) -> list[Json]:
        previous = body.get("previous_response_id")
        return [*([] if previous is None else self.kept[previous]), *body["input"]]


def _items(hop: Hop, number: int) -> list[Json]:
    thought = [reasoning(f"rs_{number:08}", hop.thought)] if hop.thought else []
    words = [spoken(f"msg_{number:08}", hop.words)] if hop.words else []
    asked = [function_call(f"fc_{number:08}_{call.id}", call.name, call.arguments, call_id=call.id) for call in hop.calls]
    return [*thought, *words, *asked]


def _heard(item: Json) -> Json:
    """An item without what the SDK's helper adds to it."""
    return {name: value for name, value in item.items() if name not in ("parsed", "parsed_arguments") and value is not None}


class ResponsesClient(Client):
    def __init__(self, session: str, tape: Tape, *, stateful: bool = False) -> None:
        self.history: list[Any] = []
        self.previous: str | None = None
        self._stateful = stateful
        self._sdk = openai.AsyncOpenAI(
            api_key="sk-proj-of-the-client",
            max_retries=0,
            default_headers={"x-session-id": session},
            http_client=openai.DefaultAsyncHttpxClient(transport=tape),
        )

    def say(self, prompt: str) -> None:
        self.history.append({"role": "user", "content": prompt})

    def answer(self, results: Sequence[tuple[Asked, str]]) -> None:
        self.history += ({"type": "function_call_output", "call_id": asked.id, "output": words} for asked, words in results)

    async def ask(self, url: str, *, stream: bool) -> list[Asked]:
        provider = "stateful" if self._stateful else "openai"
        responses = self._sdk.with_options(base_url=f"{url}/{provider}/v1").responses
        state = {"previous_response_id": self.previous} if self.previous else {}
        tool = {"type": "function", "name": "weather", "description": "The weather.", "parameters": WEATHER, "strict": False}
        request: Any = {"model": "m", "instructions": "You help.", "tools": [tool], "input": self.history, **state}
        if not self._stateful:
            request |= {"store": False, "include": ["reasoning.encrypted_content"]}
        if stream:
            async with responses.stream(**request) as events:
                response: Any = await events.get_final_response()
        else:
            response = await responses.create(**request)
        if self._stateful:
            self.history, self.previous = [], response.id
        else:
            self.history += response.output
        asked = [item for item in response.output if item.type == "function_call"]
        return [Asked(item.call_id, item.name, json.loads(item.arguments)) for item in asked]

    async def close(self) -> None:
        await self._sdk.close()
