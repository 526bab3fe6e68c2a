"""Talks to a conversation as the shell does: hears a command, answers it, or says what went wrong meanwhile.

In the manner of mitmproxy's playbooks (``test/mitmproxy/proxy/tutils.py``), so that a test reads as the dialogue that it
is. ``Dialogue`` is for tests about the order of things; ``play`` goes through a whole exchange and tells what came of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aibridge.commands import Abort, Command, End, Receive, Record, Relay, Respond, Send
from aibridge.conversation import converse
from aibridge.errors import UpstreamError
from aibridge.merger import Loop
from aibridge.wire import CHAT, MESSAGES, RESPONSES, Request, ResponseFacts, WireFormat
from aibridge.wire.observer import ResponseHead

from .recording import Recording

FORMATS: Final[Mapping[str, WireFormat]] = {"messages": MESSAGES, "chat": CHAT, "responses": RESPONSES}

CUT: Final = UpstreamError("The provider's response broke off: ClientPayloadError.")


def head(content_type: str = "text/event-stream", status: int = 200, **fields: str) -> ResponseHead:
    """A response's head. Underscores in the names of ``fields`` stand for hyphens."""
    headers = [(b"content-type", content_type.encode())]
    headers += [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    return ResponseHead(status, headers)


class Dialogue:
    """One conversation. Each call is a command that must come next, and what it is answered with.

    A command is given whole, or as its type where its contents do not matter. An exception for an answer is thrown in.
    """

    def __init__(self, request: Request, loop: Loop | None = None) -> None:
        self._conversation = converse(request, loop)
        self._next: Command | None = next(self._conversation)

    def __call__(self, expected: Command | type[Command], answer: Any = True) -> Any:
        said = self._next
        if isinstance(expected, type):
            assert isinstance(said, expected)
        else:
            assert said == expected
        try:
            if isinstance(answer, Exception):
                self._next = self._conversation.throw(answer)
            else:
                self._next = self._conversation.send(answer)
        except StopIteration:
            self._next = None
        return said

    def is_over(self) -> bool:
        return self._next is None


@dataclass(slots=True)
class Played:
    """What came of an exchange. ``before_end`` is what the client had before the records were durable."""

    response: Respond | None = None
    before_end: bytes = b""
    relayed: bytes = b""
    facts: list[ResponseFacts] = field(default_factory=list)
    end: End | None = None
    aborted: bool = False
    commands: list[Command] = field(default_factory=list)


def play(
    request: Request, head: ResponseHead, chunks: Iterable[bytes | Exception], at_end: Exception | None = None
) -> Played:
    """Carry a conversation through to its end. An exception among the chunks is thrown in where one is received."""
    played = Played()
    pieces = iter(chunks)
    conversation = converse(request)
    command = next(conversation)
    while True:
        played.commands.append(command)
        answer: Any = None
        match command:
            case Send():
                answer = head
            case Respond():
                played.response = command
            case Receive():
                answer = next(pieces, b"")
            case Relay(data):
                played.relayed += data
                answer = True
            case Record(facts):
                played.facts.append(facts)
            case End():
                played.before_end = played.relayed
                played.end = command
                answer = at_end
            case Abort():
                played.aborted = True
        try:
            command = conversation.throw(answer) if isinstance(answer, Exception) else conversation.send(answer)
        except StopIteration:
            return played


def play_recording(recording: Recording, chunks: Sequence[bytes], **fields: str) -> Played:
    """Carry an exchange of the corpus through, its body as ``chunks``, with more fields in the response's head."""
    form = FORMATS[recording.format]
    request = form.parse(recording.request)
    if not recording.streams and not recording.cut:
        fields["content_length"] = str(sum(map(len, chunks)))
    response_head = head(recording.content_type, recording.status, **fields)
    return play(request, response_head, [*filter(None, chunks), *([CUT] if recording.cut else [])])
