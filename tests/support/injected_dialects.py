"""The three dialects: how a provider says a turn in each protocol, streamed and whole, and how its SDK's objects are read.

Streams have the form that wire.md A9, B2 and C3 describe.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

import pytest

from .injected import Calls, Dialect, Json, Said, Says, Seen, Stop, Thinks, Turn, data_of, pieces, sse, usage_of


class Messages(Dialect):
    """Anthropic Messages."""

    format = "messages"
    path = "/anthropic/v1/messages"
    array = "messages"
    choices: ClassVar = {
        "none": {"type": "none"},
        "auto": {"type": "auto"},
        "any": {"type": "any"},
        "mine": {"type": "tool", "name": "mine"},
    }
    _obligatory: ClassVar[Json] = {"max_tokens": 64}
    _stops: Final = {"end": "end_turn", "calls": "tool_use", "length": "max_tokens"}

    def id_of(self, number: int) -> str:
        return f"msg_{number}"

    def tool(self, name: str, description: str) -> Json:
        return {"name": name, "description": description, "input_schema": {"type": "object"}}

    def events(self, turn: Turn, asked: Json) -> Iterator[bytes]:
        read, cached, written = usage_of(turn.number)
        usage = {"input_tokens": read, "cache_read_input_tokens": cached, "output_tokens": 1}
        start = self._message(turn) | {"content": [], "stop_reason": None, "usage": usage}
        yield self._event("message_start", message=start)
        yield self._event("ping")
        for index, said in enumerate(turn.said):
            begin, *deltas = self._deltas(said)
            yield self._event("content_block_start", index=index, content_block=begin)
            for delta in deltas:
                yield self._event("content_block_delta", index=index, delta=delta)
            yield self._event("content_block_stop", index=index)
        if turn.fails:
            yield b"event: error\ndata: " + self.error("Overloaded") + b"\n\n"
            return
        delta = {"stop_reason": self._stops[turn.stop], "stop_sequence": None}
        yield self._event("message_delta", delta=delta, usage={"output_tokens": written})
        yield self._event("message_stop")

    def body(self, turn: Turn, asked: Json) -> bytes:
        read, cached, written = usage_of(turn.number)
        usage = {"input_tokens": read, "cache_read_input_tokens": cached, "output_tokens": written}
        # Arguments stand there as they were given: 1e2 is not 100.0.
        places = {f"arguments of {index}": said for index, said in enumerate(turn.said) if isinstance(said, Calls)}
        inputs = {said: place for place, said in places.items()}
        content = [self._block(said) | ({"input": inputs[said]} if isinstance(said, Calls) else {}) for said in turn.said]
        whole = self._message(turn) | {"content": content, "stop_reason": self._stops[turn.stop], "usage": usage}
        text = json.dumps(whole, indent=1)
        for place, said in places.items():
            text = text.replace(f'"{place}"', said.arguments)
        return text.encode()

    def error(self, message: str) -> bytes:
        error = {"type": "overloaded_error", "message": message}
        return json.dumps({"type": "error", "error": error, "request_id": "req_2"}).encode()

    def appended(self, turn: Turn, results: Iterable[tuple[str, str, bool]]) -> list[Json]:
        answers = [
            {"type": "tool_result", "tool_use_id": call_id, "content": [{"type": "text", "text": words}]}
            | ({"is_error": True} if failed else {})
            for call_id, words, failed in results
        ]
        # Text without words is refused, and so is a message with a thought at its end (wire.md A6).
        said = [one for one in turn.said if not (isinstance(one, Says) and not one.words.strip())]
        while isinstance(said[-1], Thinks):
            said.pop()
        content = [self._block(one) for one in said]
        return [{"role": "assistant", "content": content}, {"role": "user", "content": answers}]

    def seen(self, final: Json) -> Seen:
        said: list[tuple[Any, ...]] = []
        for block in final["content"]:
            match block["type"]:
                case "thinking":
                    said.append(("thought", block["thinking"], block["signature"]))
                case "text":
                    said.append(("text", block["text"]))
                case kind:
                    assert kind == "tool_use"
                    said.append(("call", block["id"], block["name"], block["input"]))
        stop: Any = next(stop for stop, reason in self._stops.items() if reason == final["stop_reason"])
        counts = final["usage"]
        usage = (counts["input_tokens"], counts["cache_read_input_tokens"], counts["output_tokens"])
        return Seen(final["id"], final["model"], tuple(said), stop, usage)

    def replayed(self, final: Json, results: Mapping[str, str]) -> list[Json]:
        answers = [{"type": "tool_result", "tool_use_id": call_id, "content": words} for call_id, words in results.items()]
        return [{"role": "assistant", "content": final["content"]}, {"role": "user", "content": answers}]

    def assert_one_envelope(self, stream: bytes) -> None:
        events = data_of(stream)
        kinds = [event["type"] for event in events]
        assert (kinds.count("message_start"), kinds.count("message_delta"), kinds.count("message_stop")) == (1, 1, 1)
        assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
        starts = [event["index"] for event in events if event["type"] == "content_block_start"]
        assert starts == list(range(len(starts)))

    def _event(self, kind: str, **members: Any) -> bytes:
        return sse({"type": kind, **members}, kind)

    def _message(self, turn: Turn) -> Json:
        id_ = self.id_of(turn.number)
        return {"id": id_, "type": "message", "role": "assistant", "model": f"m-{turn.number}", "stop_sequence": None}

    def _block(self, said: Said) -> Json:
        match said:
            case Thinks(words, signature):
                return {"type": "thinking", "thinking": words, "signature": signature}
            case Says(words):
                return {"type": "text", "text": words}
            case Calls(id_, name, arguments):
                return {"type": "tool_use", "id": id_, "name": name, "input": json.loads(arguments)}

    def _deltas(self, said: Said) -> list[Json]:
        match said:
            case Thinks(words, signature):
                deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces(words)]
                signed = {"type": "signature_delta", "signature": signature}
                return [{"type": "thinking", "thinking": "", "signature": ""}, *deltas, signed]
            case Says(words):
                return [{"type": "text", "text": ""}, *({"type": "text_delta", "text": piece} for piece in pieces(words))]
            case Calls(id_, name, arguments):
                deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in ["", *pieces(arguments)]]
                return [{"type": "tool_use", "id": id_, "name": name, "input": {}}, *deltas]


class Chat(Dialect):
    """OpenAI Chat Completions, with thoughts as DeepSeek has them. Usage is for who asked for it (wire.md B2, B3)."""

    format = "chat"
    path = "/openai/v1/chat/completions"
    array = "messages"
    choices: ClassVar = {
        "none": "none",
        "auto": "auto",
        "any": "required",
        "mine": {"type": "function", "function": {"name": "mine"}},
    }
    _wants_usage: ClassVar[Json] = {"stream_options": {"include_usage": True}}
    _stops: Final = {"end": "stop", "calls": "tool_calls", "length": "length"}

    def id_of(self, number: int) -> str:
        return f"chatcmpl-{number}"

    def tool(self, name: str, description: str) -> Json:
        return {"type": "function", "function": {"name": name, "description": description, "parameters": {"type": "object"}}}

    def events(self, turn: Turn, asked: Json) -> Iterator[bytes]:
        reports = (asked.get("stream_options") or {}).get("include_usage") is True
        has_text = any(isinstance(said, Says) for said in turn.said)
        deltas: list[Json] = [{"role": "assistant", "content": "" if has_text else None}]
        for said in turn.said:
            deltas += self._deltas(turn, said)
        for delta in deltas:
            yield self._chunk(turn, [{"index": 0, "delta": delta, "finish_reason": None}], reports=reports)
        if turn.fails:
            yield b"data: " + self.error("Overloaded") + b"\n\n"
            return
        yield self._chunk(turn, [{"index": 0, "delta": {}, "finish_reason": self._stops[turn.stop]}], reports=reports)
        if reports:
            yield self._chunk(turn, [], usage=self._usage(turn))
        yield b"data: [DONE]\n\n"

    def body(self, turn: Turn, asked: Json) -> bytes:
        choice = {"index": 0, "message": self._message(turn), "finish_reason": self._stops[turn.stop]}
        whole = self._envelope(turn) | {"object": "chat.completion", "choices": [choice], "usage": self._usage(turn)}
        return json.dumps(whole, indent=1).encode()

    def appended(self, turn: Turn, results: Iterable[tuple[str, str, bool]]) -> list[Json]:
        return [
            self._message(turn),
            *(
                {"role": "tool", "tool_call_id": call_id, "content": f"Error: {words}" if failed else words}
                for call_id, words, failed in results
            ),
        ]

    def seen(self, final: Json) -> Seen:
        (choice,) = final["choices"]
        message = choice["message"]
        said: list[tuple[Any, ...]] = []
        if message.get("reasoning_content"):
            said.append(("thought", message["reasoning_content"], ""))
        if message.get("content"):
            said.append(("text", message["content"]))
        for call in message.get("tool_calls") or []:
            function = call["function"]
            said.append(("call", call["id"], function["name"], json.loads(function["arguments"])))
        stop: Any = next(stop for stop, reason in self._stops.items() if reason == choice["finish_reason"])
        counts = final.get("usage")
        usage = counts and (
            counts["prompt_tokens"],
            counts["prompt_tokens_details"]["cached_tokens"],
            counts["completion_tokens"],
        )
        return Seen(final["id"], final["model"], tuple(said), stop, usage)

    def shown(self, said: Iterable[Said]) -> tuple[tuple[Any, ...], ...]:
        """All thoughts, all texts, and the calls: a message has no order between them."""
        every = list(said)
        thoughts = "".join(one.words for one in every if isinstance(one, Thinks))
        words = "".join(one.words for one in every if isinstance(one, Says))
        merged: list[Said] = [*([Thinks(thoughts)] if thoughts else []), *([Says(words)] if words else [])]
        return super().shown([*merged, *(one for one in every if isinstance(one, Calls))])

    def replayed(self, final: Json, results: Mapping[str, str]) -> list[Json]:
        message = dict(final["choices"][0]["message"])
        message["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": _only(call["function"], "name", "arguments")}
            for call in message["tool_calls"]
        ]
        answers = [{"role": "tool", "tool_call_id": call_id, "content": words} for call_id, words in results.items()]
        return [_only(message, "role", "content", "reasoning_content", "tool_calls"), *answers]

    def assert_one_envelope(self, stream: bytes) -> None:
        assert stream.endswith(b"data: [DONE]\n\n") and stream.count(b"[DONE]") == 1
        chunks = data_of(stream)
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert [bool(choice["finish_reason"]) for choice in choices] == [*[False] * (len(choices) - 1), True]
        assert sum("role" in choice["delta"] for choice in choices) == 1
        assert all(chunk["choices"] for chunk in chunks[:-1]), "usage is last"
        numbers = [call["index"] for choice in choices for call in choice["delta"].get("tool_calls", [])]
        assert numbers == sorted(numbers) and set(numbers) == set(range(len(set(numbers))))

    def _envelope(self, turn: Turn) -> Json:
        return {"id": self.id_of(turn.number), "created": 1795219200 + turn.number, "model": f"m-{turn.number}"}

    def _chunk(self, turn: Turn, choices: list[Json], *, reports: bool = False, **members: Any) -> bytes:
        nothing = {"usage": None} if reports else {}
        return sse(self._envelope(turn) | {"object": "chat.completion.chunk", "choices": choices} | nothing | members)

    def _usage(self, turn: Turn) -> Json:
        read, cached, written = usage_of(turn.number)
        details = {"prompt_tokens_details": {"cached_tokens": cached}}
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written, **details}

    def _message(self, turn: Turn) -> Json:
        words = [said.words for said in turn.said if isinstance(said, Says)]
        thoughts = [said.words for said in turn.said if isinstance(said, Thinks)]
        message: Json = {"role": "assistant", "content": "".join(words) if words else None}
        if turn.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.tool, "arguments": call.arguments}}
                for call in turn.calls
            ]
        return message | ({"reasoning_content": "".join(thoughts)} if any(thoughts) else {})

    def _deltas(self, turn: Turn, said: Said) -> list[Json]:
        match said:
            case Thinks(words):
                return [{"reasoning_content": piece} for piece in pieces(words)]
            case Says(words):
                return [{"content": piece} for piece in pieces(words)]
            case Calls(id_, name, arguments):
                index = next(index for index, call in enumerate(turn.calls) if call is said)
                begin = {"index": index, "id": id_, "type": "function", "function": {"name": name, "arguments": ""}}
                parts = [{"index": index, "function": {"arguments": piece}} for piece in pieces(arguments)]
                return [{"tool_calls": [part]} for part in [begin, *parts]]


class Responses(Dialect):
    """OpenAI Responses. The response object repeats the request's tools and its choice, as OpenAI's does."""

    format = "responses"
    path = "/openai/v1/responses"
    array = "input"
    choices: ClassVar = {"none": "none", "auto": "auto", "any": "required", "mine": {"type": "function", "name": "mine"}}

    def id_of(self, number: int) -> str:
        return f"resp_{number}"

    def tool(self, name: str, description: str) -> Json:
        known = {"type": "function", "name": name, "description": description, "parameters": {"type": "object"}}
        return known | {"strict": False}

    def events(self, turn: Turn, asked: Json) -> Iterator[bytes]:
        for number, event in enumerate(self._events(turn, asked)):
            yield sse({"type": event.pop("type"), "sequence_number": number, **event}, None)

    def body(self, turn: Turn, asked: Json) -> bytes:
        return json.dumps(self._response(turn, asked), indent=1).encode()

    def appended(self, turn: Turn, results: Iterable[tuple[str, str, bool]]) -> list[Json]:
        answers = [{"type": "function_call_output", "call_id": call_id, "output": words} for call_id, words, _ in results]
        return [*self._items(turn), *answers]

    def seen(self, final: Json) -> Seen:
        said: list[tuple[Any, ...]] = []
        for item in final["output"]:
            match item["type"]:
                case "reasoning":
                    said.append(("thought", item["summary"][0]["text"], item["encrypted_content"]))
                case "message":
                    said.append(("text", item["content"][0]["text"]))
                case kind:
                    assert kind == "function_call"
                    said.append(("call", item["call_id"], item["name"], json.loads(item["arguments"])))
        ended: Stop = "calls" if any(one[0] == "call" for one in said) else "end"
        stop: Stop = "length" if final["status"] == "incomplete" else ended
        counts = final["usage"]
        usage = (counts["input_tokens"], counts["input_tokens_details"]["cached_tokens"], counts["output_tokens"])
        return Seen(final["id"], final["model"], tuple(said), stop, usage)

    def replayed(self, final: Json, results: Mapping[str, str]) -> list[Json]:
        answers = [
            {"type": "function_call_output", "call_id": call_id, "output": words} for call_id, words in results.items()
        ]
        output = json.loads(json.dumps(final["output"]), object_hook=_without_parsed)
        return [*output, *answers]

    def assert_one_envelope(self, stream: bytes) -> None:
        events = data_of(stream)
        kinds = [event["type"] for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert sum(kind in {"response.created", "response.completed", "response.incomplete"} for kind in kinds) == 2
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert len({event["response"]["id"] for event in events if "response" in event}) == 1
        added = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
        assert added == list(range(len(added)))
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert events[-1]["response"]["output"] == done

    def _response(self, turn: Turn, asked: Json, status: str | None = None) -> Json:
        read, cached, written = usage_of(turn.number)
        usage = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        }
        ended = "incomplete" if turn.stop == "length" else "completed"
        return {
            "id": self.id_of(turn.number),
            "object": "response",
            "created_at": 1795219200 + turn.number,
            "status": status or ended,
            "error": {"code": "server_error", "message": "Overloaded"} if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if turn.stop == "length" and not status else None,
            "model": f"m-{turn.number}",
            "output": [] if status else self._items(turn),
            "parallel_tool_calls": True,
            "previous_response_id": asked.get("previous_response_id"),
            "tool_choice": asked.get("tool_choice", "auto"),
            "tools": asked.get("tools", []),
            "usage": None if status else usage,
        }

    def _events(self, turn: Turn, asked: Json) -> Iterator[Json]:
        for state in ("created", "in_progress"):
            yield {"type": f"response.{state}", "response": self._response(turn, asked, "in_progress")}
        for index, item in enumerate(self._items(turn)):
            begun = item | {
                name: empty for name, empty in (("content", []), ("summary", []), ("arguments", "")) if name in item
            }
            yield {"type": "response.output_item.added", "output_index": index, "item": begun}
            yield from self._parts({"output_index": index, "item_id": item["id"]}, item)
            yield {"type": "response.output_item.done", "output_index": index, "item": item}
        ended = self._response(turn, asked, "failed" if turn.fails else None)
        yield {"type": f"response.{ended['status']}", "response": ended}

    def _items(self, turn: Turn) -> list[Json]:
        return [self._item(f"{turn.number}_{index}", said) for index, said in enumerate(turn.said)]

    def _item(self, place: str, said: Said) -> Json:
        match said:
            case Thinks(words, signature):
                summary = [{"type": "summary_text", "text": words}]
                return {"id": f"rs_item_{place}", "type": "reasoning", "summary": summary, "encrypted_content": signature}
            case Says(words):
                part = {"type": "output_text", "text": words, "annotations": [], "logprobs": []}
                known = {"id": f"msg_item_{place}", "type": "message", "status": "completed", "role": "assistant"}
                return known | {"content": [part]}
            case Calls(id_, name, arguments):
                known = {"id": f"fc_item_{place}", "type": "function_call", "status": "completed"}
                return known | {"arguments": arguments, "call_id": id_, "name": name}

    def _parts(self, place: Json, item: Json) -> Iterator[Json]:
        if item["type"] == "message":
            part = item["content"][0]
            at = place | {"content_index": 0}
            yield {"type": "response.content_part.added", **at, "part": part | {"text": ""}}
            for piece in pieces(part["text"]):
                yield {"type": "response.output_text.delta", **at, "delta": piece, "logprobs": []}
            yield {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": []}
            yield {"type": "response.content_part.done", **at, "part": part}
        elif item["type"] == "reasoning":
            part = item["summary"][0]
            at = place | {"summary_index": 0}
            yield {"type": "response.reasoning_summary_part.added", **at, "part": part | {"text": ""}}
            for piece in pieces(part["text"]):
                yield {"type": "response.reasoning_summary_text.delta", **at, "delta": piece}
            yield {"type": "response.reasoning_summary_text.done", **at, "text": part["text"]}
            yield {"type": "response.reasoning_summary_part.done", **at, "part": part}
        else:
            for piece in pieces(item["arguments"]):
                yield {"type": "response.function_call_arguments.delta", **place, "delta": piece}
            whole = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **place, **whole}


def _only(members: Json, *names: str) -> Json:
    return {name: members[name] for name in names if name in members}


def _without_parsed(members: Json) -> Json:
    """The SDK's helper adds what it parsed."""
    return {name: value for name, value in members.items() if name not in {"parsed", "parsed_arguments"}}


MESSAGES: Final = Messages()
CHAT: Final = Chat()
RESPONSES: Final = Responses()
DIALECTS: Final[Sequence[Dialect]] = (MESSAGES, CHAT, RESPONSES)

each_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=str)
both_ways = pytest.mark.parametrize("stream", [True, False], ids=["stream", "blocking"])
