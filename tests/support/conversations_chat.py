"""The parts of a conversation in Chat Completions: the provider's, and the client's with OpenAI's SDK.

The provider thinks aloud in ``reasoning_content``, and wants it back (wire.md B3).
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import openai

from .conversations import WEATHER, Asked, Call, Client, Entry, Hop, Speech, Tape, only_once, streamed
from .facts import Json
from .provider import Reply
from .turns_chat import call as fragments, called, spoken, whole


class ChatSpeech(Speech):
    conversation = "messages"
    constants = ("tools",)

    def said(self, hop: Hop, number: int) -> Any:
        return _heard(_message(hop))

    def heard(self, body: Json) -> list[Entry]:
        entries: list[Entry] = []
        results: list[tuple[str, str]] = []
        for message in body["messages"]:
            if message["role"] == "tool":
                results.append((message["tool_call_id"], message["content"]))
                entries[-1:] = [*(entries[-1:] if entries[-1][0] == "model" else []), ("results", only_once(results))]
                continue
            results = []
            if message["role"] == "assistant":
                entries.append(("model", _heard(message)))
            elif message["role"] == "user":
                entries.append(("user", message["content"]))
        return entries

    def result(self, call: Call) -> Any:
        return f"Error: {call.result}" if call.fails else call.result

    def reply(self, hop: Hop, number: int, body: Json) -> Reply:
        if not body.get("stream"):
            return Reply.json(whole(_message(hop), "tool_calls" if hop.calls else "stop", number))
        asked = [fragments(index, call.id, call.name, call.arguments) for index, call in enumerate(hop.calls)]
        thought = {"reasoning_content": hop.thought} if hop.thought else {}
        words = re.findall(r"\S+\s*", hop.words)
        return streamed(spoken(*words, calls=asked, hop=number, **thought), number)


def _message(hop: Hop) -> Json:
    message: Json = {"role": "assistant", "content": hop.words or None, "refusal": None}
    if hop.thought:
        message["reasoning_content"] = hop.thought
    if hop.calls:
        message["tool_calls"] = [called(call.id, call.name, call.arguments) for call in hop.calls]
    return message


def _heard(message: Json) -> Json:
    """What a message says, whatever members it has beside."""
    asked = message.get("tool_calls") or []
    return {
        "content": message.get("content") or "",
        "thought": message.get("reasoning_content") or "",
        "calls": [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"])) for call in asked],
    }


class ChatClient(Client):
    def __init__(self, session: str, tape: Tape) -> None:
        self.history: list[Any] = [{"role": "system", "content": "You help."}]
        self._sdk = openai.AsyncOpenAI(
            api_key="sk-proj-of-the-client",
            max_retries=0,
            default_headers={"x-session-id": session},
            http_client=openai.DefaultAsyncHttpxClient(transport=tape),
        )

    def say(self, prompt: str) -> None:
        self.history.append({"role": "user", "content": prompt})

    def answer(self, results: Sequence[tuple[Asked, str]]) -> None:
        self.history += ({"role": "tool", "tool_call_id": asked.id, "content": words} for asked, words in results)

    async def ask(self, url: str, *, stream: bool) -> list[Asked]:
        completions = self._sdk.with_options(base_url=f"{url}/openai/v1").chat.completions
        tool = {"name": "weather", "description": "The weather.", "parameters": WEATHER}
        request: Any = {"model": "m", "tools": [{"type": "function", "function": tool}], "messages": self.history}
        if stream:
            async with completions.stream(**request) as events:
                completion: Any = await events.get_final_completion()
        else:
            completion = await completions.create(**request)
        message = completion.choices[0].message
        self.history.append(message)
        asked = message.tool_calls or []
        return [Asked(call.id, call.function.name, json.loads(call.function.arguments)) for call in asked]

    async def close(self) -> None:
        await self._sdk.close()
