"""What clients replay of Anthropic Messages, and what was hidden from them put back into it.

Facts from wire.md A2, A3, A6, D6 and E. What a client replays of a response is matched with what is remembered of it:
pieces that are the same come back in the provider's own bytes, hidden ones come back where they were, and what the client
changed, added or left out is the client's decision.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec
from msgspec import Raw

from aibridge.wire.reading import Members, Unreadable, is_null, items, members, parse_object, text
from aibridge.wire.splicing import Edit, edited, element_spans, member_span, separator, with_member, written_members
from aibridge.wire.turns import Draft, Memory, Prefix, Restored, is_strong, key_of

# The member that tells blocks of one type apart, in the order in which they are asked. The first three are never given
# twice, and neither is an id that is one.
_IDENTITIES: Final = ("signature", "encrypted_content", "data", "id", "tool_use_id", "text", "thinking", "content")
_UNIQUE: Final = frozenset(_IDENTITIES[:3])

_THOUGHTS: Final = frozenset({"thinking", "redacted_thinking"})


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a turn. `result` is what was sent for it, where it is a hidden call."""

    raw: bytes
    result: bytes | None = None


_turns: Final = msgspec.msgpack.Decoder(list[list[Kept]])


@dataclass(frozen=True, slots=True)
class Block:
    """A content block, read for what it can be recognised by.

    Two of one `kind` with one `identity` are the same: clients change key order, spacing and cache marks, and trim texts.
    `word` is what it adds to what was said, without space around it. `key` is there if it is never given twice.
    """

    raw: bytes
    kind: str
    identity: str
    word: str
    key: str | None
    mark: bytes | None

    @classmethod
    def read(cls, raw: bytes) -> "Block":
        block = members(raw)
        kind = text(block.get("type")) or ""
        name, identity = next(((name, value) for name in _IDENTITIES if (value := text(block.get(name)))), ("", ""))
        is_unique = name in _UNIQUE or (name == "id" and is_strong(identity))
        said = {"text": "text", "tool_result": "tool_use_id"}.get(kind, "id" if kind.endswith("tool_use") else "")
        return cls(
            raw,
            kind,
            identity.strip(),
            (text(block.get(said)) or "").strip(),
            key_of(name, identity) if is_unique else None,
            bytes(block["cache_control"]) if "cache_control" in block else None,
        )

    def is_same(self, other: "Block") -> bool:
        return (self.kind, self.identity) == (other.kind, other.identity)


@dataclass(slots=True)
class _Message:
    """A message of the request and where in its body it lies. `keys` are what to recall memories of its pieces by.

    `content` is the text of an array: a string is one text block. Content that is neither has no blocks.
    """

    start: int
    end: int
    role: str
    content: bytes
    blocks: list[Block]
    keys: tuple[str, ...] = ()


def _read_message(raw: bytes, start: int) -> _Message:
    role, content, blocks = "", b"", []
    with suppress(Unreadable):
        message = written_members(raw)
        role = text(message.get("role")) or ""
        content = bytes(message.get("content", b""))
        if content.startswith(b'"'):
            content = b'[{"type":"text","text":%b}]' % content
        blocks = [Block.read(content[begin:end]) for begin, end in element_spans(content)]
    return _Message(start, start + len(raw), role, content, blocks)


def _messages(body: bytes) -> Iterator[_Message]:
    span = member_span(body, "messages")
    if span is None:
        raise Unreadable("no messages")
    for start, end in element_spans(body[slice(*span)]):
        yield _read_message(body[span[0] + start : span[0] + end], span[0] + start)


class _Said:
    """The conversation so far, as clients repeat it: who speaks, texts, ids of calls and results. Thoughts may be dropped,
    and messages of one role in a row be one.
    """

    def __init__(self) -> None:
        self._prefix = Prefix()
        self._role = ""

    def add(self, message: _Message) -> list[str]:
        """A message is said: the keys before it and after each of its pieces. System messages come and go."""
        if message.role not in ("user", "assistant"):
            return []
        if message.role != self._role:
            self._role = message.role
            self._prefix.add(message.role)
        keys = [self._prefix.key()]
        for word in (block.word for block in message.blocks if block.word):
            self._prefix.add(word)
            keys.append(self._prefix.key())
        return keys

    def key(self, role: str, *words: str) -> str:
        """The key after something more is said."""
        speaker = () if role == self._role else (role,)
        return self._prefix.key(*speaker, *(word for word in words if word))


def written_message(role: str, content: Iterable[bytes]) -> bytes:
    return b'{"role":"%b","content":[%b]}' % (role.encode(), b",".join(content))


def assistant_message(pieces: Iterable[bytes]) -> list[bytes]:
    """The message of those pieces; none where none are left. Text without words, and thoughts at its end, are refused as
    input even where the model gave them (wire.md A6).
    """
    blocks = [block for block in map(Block.read, pieces) if block.kind != "text" or block.word]
    while blocks and blocks[-1].kind in _THOUGHTS:
        blocks.pop()
    return [written_message("assistant", [block.raw for block in blocks])] if blocks else []


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    """Pieces next to each other that one response gave, or that nothing is known of."""

    memory: Memory | None
    blocks: list[Block]

    @cached_property
    def turns(self) -> list[list[Kept]] | None:
        """Those of the response: none where nothing was hidden, None where what was is lost."""
        if self.memory is None or self.memory.data == b"":
            return []
        try:
            return None if self.memory.data is None else _turns.decode(self.memory.data)
        except msgspec.MsgspecError:
            return None


@dataclass(slots=True)
class _Passage:
    """Assistant messages, from one to another, that have to be seen together: mostly it is one message of one part."""

    first: int
    last: int
    parts: list[_Part]


class MessagesDraft(Draft):
    """A Messages request as the client sent it."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.said = _Said()
        self._messages: list[_Message] = []
        try:
            top = parse_object(body)
            self._messages = list(_messages(body))
        except Unreadable:
            self.objection = "The request has no messages that can be read."
            return
        tools = [members(tool) for tool in items(top.get("tools"))]
        self.tool_names = frozenset(name for tool in tools if (name := text(tool.get("name"))) is not None)
        self.objection = _objection(top)
        output_format = members(top.get("output_config")).get("format")
        self.is_aside = not tools and output_format is not None and not is_null(output_format)
        for message in self._messages:
            weak = self.said.add(message)
            if message.role == "assistant":
                message.keys = tuple(block.key for block in message.blocks if block.key) or tuple(weak)
        self.keys = tuple(dict.fromkeys(key for message in self._messages for key in message.keys))

    def restored(self, found: Mapping[str, Memory]) -> Restored:
        """The request with what was hidden put back (wire.md D6)."""
        passages = self._passages(found)
        parts = [part for passage in passages for part in passage.parts if part.memory is not None]
        changed = [passage for passage in passages if any(part.turns for part in passage.parts)]
        between = separator(self.body) if changed else b""
        body = edited(self.body, [edit for passage in changed for edit in self._edits(passage, between)])
        lost = sum(part.turns is None for part in parts)
        unknown = [passage for passage in passages if all(part.memory is None for part in passage.parts)]
        return Restored(
            _without_thoughts(body) if lost else body,
            toolset=parts[-1].memory.toolset if parts and parts[-1].memory else None,
            restored=sum(bool(part.turns) for part in parts),
            lost=lost,
            unknown=len(unknown),
            bound=any(block.kind in _THOUGHTS and block.key for p in unknown for part in p.parts for block in part.blocks),
        )

    def _passages(self, found: Mapping[str, Memory]) -> list[_Passage]:
        passages: list[_Passage] = []
        for number, message in enumerate(self._messages):
            if message.role != "assistant":
                continue
            parts = _parts(message, found)
            before = passages[-1] if passages and passages[-1].last == number - 1 else None
            if before is not None and parts[0].memory is not None and before.parts[-1].memory == parts[0].memory:
                before.last = number
                before.parts[-1].blocks += parts[0].blocks
                before.parts += parts[1:]
            else:
                passages.append(_Passage(number, number, parts))
        return passages

    def _edits(self, passage: _Passage, between: bytes) -> list[Edit]:
        """What puts back the hidden parts of a passage: messages in place of its own, and parked results into the next."""
        new: list[bytes] = []
        parked: Sequence[Kept] = ()
        for part in passage.parts:
            messages, parked = _put_back(part.turns or [], part.blocks)
            new += messages
        span = (self._messages[passage.first].start, self._messages[passage.last].end)
        following = next(iter(self._messages[passage.last + 1 :]), None)
        edits: list[Edit] = []
        if parked and following is not None and following.role == "user" and following.content.startswith(b"["):
            message, content = self.body[following.start : following.end], _with_results(following, parked, between)
            edits.append((following.start, following.end, with_member(message, "content", content)))
        elif parked:
            new.append(written_message("user", (piece.result for piece in parked if piece.result is not None)))
        if new:
            edits.append((*span, between.join(new)))
        elif following is not None:  # only thoughts were left, which nobody takes without what they led to
            edits.append((span[0], following.start, b""))
        return edits


def _objection(top: Members) -> str | None:
    if not is_null(top.get("thread", Raw(b"null"))):
        return "The provider holds the conversation, so the request does not show what was hidden in it."
    return None


# --- putting back -----------------------------------------------------------------------------------------------------


def _parts(message: _Message, found: Mapping[str, Memory]) -> list[_Part]:
    """The pieces of a message by the responses that gave them; what has no key of its own goes with what is before it."""
    if not any(block.key for block in message.blocks):  # the longest of what was said is the newest
        memory = next((found[key] for key in reversed(message.keys) if key in found), None)
        return [_Part(memory, list(message.blocks))]
    parts = [_Part(None, [])]
    for block in message.blocks:
        memory = found.get(block.key or "")
        if memory is not None and parts[-1].memory not in (None, memory):
            parts.append(_Part(None, []))
        parts[-1].memory = parts[-1].memory or memory
        parts[-1].blocks.append(block)
    return parts


def _put_back(turns: Sequence[Sequence[Kept]], blocks: Iterable[Block]) -> tuple[list[bytes], Sequence[Kept]]:
    """The messages of a response with what was hidden in it, and the turn whose results the client's have to join."""
    messages: list[bytes] = []
    content: list[bytes] = []
    parked: Sequence[Kept] = ()
    for turn, pieces in zip([*turns, ()], _aligned(turns, blocks), strict=True):
        content += pieces
        results = [piece.result for piece in turn if piece.result is not None]
        if results and any(piece.result is None and Block.read(piece.raw).kind == "tool_use" for piece in turn):
            parked = turn
        elif results:
            messages += [*assistant_message(content), written_message("user", results)]
            content = []
    return [*messages, *assistant_message(content)], parked


def _aligned(turns: Sequence[Sequence[Kept]], blocks: Iterable[Block]) -> list[list[bytes]]:
    """The content of each turn, and of what follows them: the client's pieces, with those that are known in the provider's
    bytes, and the hidden ones between them.

    A piece that is not known takes the place of one of its kind that is missing, else it comes as late as it can: what
    broke off after a call stands after the call's result.
    """
    contents: list[list[bytes]] = [[] for _ in range(len(turns) + 1)]
    kept = [(number, piece, Block.read(piece.raw)) for number, turn in enumerate(turns) for piece in turn]
    position = 0
    strange: list[Block] = []

    def advance(end: int) -> None:
        for number, piece, block in kept[position:end]:
            if piece.result is not None:
                contents[number].append(piece.raw)
            elif strange and strange[0].kind == block.kind:
                contents[number].append(strange.pop(0).raw)
        number = kept[end][0] if end < len(kept) else len(turns)
        contents[number] += (block.raw for block in strange)
        strange.clear()

    for block in blocks:
        same = (n for n in range(position, len(kept)) if kept[n][1].result is None and kept[n][2].is_same(block))
        if (found := next(same, None)) is None:
            strange.append(block)
            continue
        advance(found)
        number, piece, _ = kept[found]
        contents[number].append(piece.raw if block.mark is None else with_member(piece.raw, "cache_control", block.mark))
        position = found + 1
    advance(len(kept))
    return contents


def _with_results(message: _Message, turn: Sequence[Kept], between: bytes) -> bytes:
    """The content of the client's message with the parked results of a turn among its own, in the order of the calls."""
    content, spans = message.content, element_spans(message.content)
    own = {block.identity: place for place, block in enumerate(message.blocks) if block.kind == "tool_result"}
    edits: list[Edit] = []
    place = 0  # among the client's: where the result of the next call belongs
    for piece in turn:
        if piece.result is None:
            place = max(place, own.get(Block.read(piece.raw).identity, -1) + 1)
        elif place < len(spans):
            edits.append((spans[place][0], spans[place][0], piece.result + between))
        else:
            end = content.rindex(b"]")
            edits.append((end, end, (between if spans or edits else b"") + piece.result))
    return edited(content, edits)


def _without_thoughts(body: bytes) -> bytes:
    """The request without any thinking: what it was bound to is gone, and dropping all of it stays valid (wire.md A6)."""
    between = separator(body)
    left: list[bytes] = []
    for message in _messages(body):
        raw = body[message.start : message.end]
        blocks = [block.raw for block in message.blocks if block.kind not in _THOUGHTS]
        if message.role != "assistant" or len(blocks) == len(message.blocks):
            left.append(raw)
        elif blocks:
            left.append(with_member(raw, "content", b"[%b]" % between.join(blocks)))
    return with_member(body, "messages", b"[%b]" % between.join(left))
