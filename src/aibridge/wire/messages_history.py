"""What clients replay of Anthropic Messages, and what was hidden from them put back into it.

Facts from wire.md A2, A3, A6, D6 and E. What a client replays of a response is matched with what is remembered of it:
pieces that are the same come back in the provider's own bytes, hidden ones come back where they were, and what the client
changed, added or left out is the client's decision.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from msgspec import Raw

from aibridge.wire.reading import Members, Unreadable, is_null, items, members, parse_object, text
from aibridge.wire.splicing import Edit, edited, element_spans, member_span, separator, with_member, written_members
from aibridge.wire.turns import Draft, Memory, Restored, is_strong, key_of

# The member that tells blocks of one type apart, in the order in which they are asked. The first three are never given
# twice, and neither is an id that is one.
_IDENTITIES: Final = ("signature", "encrypted_content", "data", "id", "tool_use_id", "text", "thinking", "content")
_UNIQUE: Final = frozenset(_IDENTITIES[:3])

_THOUGHTS: Final = frozenset({"thinking", "redacted_thinking"})

LEGACY_SESSION: Final = re.compile(r"_session_([0-9a-fA-F-]{36})$")
"""How clients before 2026 end `metadata.user_id`: user_<hash>_account_<uuid>_session_<uuid>. Claude Code now sends a JSON
object in a string (clients.md 2)."""

_SPACE: Final = b" \t\r\n\f\v"


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a turn. `result` is what was sent for it, where it is a hidden call."""

    raw: bytes
    result: bytes | None = None


_turns: Final = msgspec.msgpack.Decoder(list[list[Kept]])


@dataclass(frozen=True, slots=True)
class Block:
    """A content block, read for what it can be recognised by.

    Two of one `kind` with one `identity` are the same: clients change key order, spacing and cache marks, and trim texts.
    `word` is what it adds to what was said: a text without its white space, or an id between spaces. `key` is there if it
    is never given twice.
    """

    raw: bytes
    kind: str
    identity: str
    word: bytes
    key: str | None
    mark: bytes | None

    @classmethod
    def read(cls, raw: bytes) -> "Block":
        block = members(raw)
        kind = text(block.get("type")) or ""
        name, identity = next(((name, value) for name in _IDENTITIES if (value := text(block.get(name)))), ("", ""))
        is_unique = name in _UNIQUE or (name == "id" and is_strong(identity))
        return cls(
            raw,
            kind,
            identity.strip(),
            _word(kind, block),
            key_of(name, identity) if is_unique else None,
            bytes(block["cache_control"]) if "cache_control" in block else None,
        )

    @property
    def is_call(self) -> bool:
        return self.kind.endswith("tool_use")

    def called(self) -> tuple[str | None, Any]:
        """What a call says. Clients write its JSON anew, and many of them know no numbers but floating ones."""
        call = members(self.raw)
        given = bytes(call.get("input", b""))
        try:
            return text(call.get("name")), json.dumps(json.loads(given, parse_int=float), sort_keys=True)
        except (ValueError, RecursionError):
            return text(call.get("name")), given


def _word(kind: str, block: Members) -> bytes:
    if kind == "text":
        return _squeezed(text(block.get("text")))
    name = {"tool_result": "tool_use_id"}.get(kind, "id" if kind.endswith("tool_use") else "")
    word = _squeezed(text(block.get(name)))
    return b" %b " % word if word else b""


def _squeezed(words: str | None) -> bytes:
    return (words or "").strip().encode().translate(None, _SPACE)


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
    """The conversation so far, as clients repeat it: for whom, who speaks, texts, ids of calls and results. Thoughts may be
    dropped, messages of one role in a row be one, and so may texts, with any white space where they meet.

    It is a digest that grows. Words have no white space in them, so that what stands between it are no words.
    """

    def __init__(self, end_user: str) -> None:
        self._hash = hashlib.sha256(key_of("user", end_user).encode())
        self._role = ""

    def add(self, message: _Message) -> list[str]:
        """A message is said: the keys before it and after each of its pieces. System messages come and go."""
        if message.role not in ("user", "assistant"):
            return []
        self._hash.update(self._turn_of(message.role))
        self._role = message.role
        keys = [self.key(message.role, ())]
        for word in (block.word for block in message.blocks if block.word):
            self._hash.update(word)
            keys.append(self.key(message.role, ()))
        return keys

    def key(self, role: str, words: Iterable[bytes]) -> str:
        """The key after something more is said."""
        digest = self._hash.copy()
        digest.update(self._turn_of(role) + b"".join(words))
        return key_of("said", digest.hexdigest())

    def _turn_of(self, role: str) -> bytes:
        return b"" if role == self._role else b"\n%b\n" % role.encode()


def _end_user(top: Members) -> str:
    """Who the client says it asks for: one actor may be a service that many people talk to.

    The session is no part of it: Claude Code has another one after it resumed a conversation.
    """
    user_id = text(members(top.get("metadata")).get("user_id")) or ""
    named = members(user_id.encode())
    if not named:
        return LEGACY_SESSION.sub("", user_id)
    return repr(sorted((name, bytes(raw)) for name, raw in named.items() if name != "session_id"))


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


@dataclass(slots=True, eq=False)
class _Part:
    """Pieces next to each other that one response gave, or that nothing is known of. `is_last`: it gave no more of them."""

    walk: "_Walk | None"
    blocks: list[Block]
    is_last: bool = False

    @property
    def hides(self) -> bool:
        return self.walk is not None and bool(self.walk.turns)

    def contents(self) -> Iterable[Sequence[Kept]]:
        """What was said in each turn, hidden pieces and all."""
        if self.walk is None or not self.walk.turns:
            return [[Kept(block.raw) for block in self.blocks]]
        return self.walk.take(self.blocks, is_last=self.is_last)


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
        self._messages: list[_Message] = []
        top: Members = {}
        try:
            top = parse_object(body)
            self._messages = list(_messages(body))
            self.objection = _objection(top)
        except Unreadable:
            self.objection = "The request has no messages that can be read."
        tools = [members(tool) for tool in items(top.get("tools"))]
        self.tool_names = frozenset(name for tool in tools if (name := text(tool.get("name"))) is not None)
        output_format = members(top.get("output_config")).get("format")
        self.is_aside = not tools and output_format is not None and not is_null(output_format)
        self.said = _Said(_end_user(top))
        for message in self._messages:
            weak = self.said.add(message)
            if message.role == "assistant":
                message.keys = tuple(block.key for block in message.blocks if block.key) or tuple(weak)
        self.keys = tuple(dict.fromkeys(key for message in self._messages for key in message.keys))

    def restored(self, found: Mapping[str, Memory]) -> Restored:
        """The request with what was hidden put back (wire.md D6)."""
        walks = {memory: _Walk(memory) for memory in dict.fromkeys(found.values())}
        passages = self._passages({key: walks[memory] for key, memory in found.items()})
        last = {part.walk: part for passage in passages for part in passage.parts if part.walk is not None}
        for part in last.values():
            part.is_last = True
        changed = [passage for passage in passages if any(part.hides for part in passage.parts)]
        between = separator(self.body) if changed else b""
        body = edited(self.body, [edit for passage in changed for edit in self._edits(passage, between)])
        lost = sum(walk.turns is None for walk in last)
        unknown = [passage for passage in passages if all(part.walk is None for part in passage.parts)]
        return Restored(
            _without_thoughts(body) if lost else body,
            toolset=next((walk.toolset for walk in reversed(last)), None),
            restored=sum(bool(walk.turns) for walk in last),
            lost=lost,
            unknown=len(unknown),
            bound=any(block.kind in _THOUGHTS and block.key for p in unknown for part in p.parts for block in part.blocks),
        )

    def _passages(self, found: Mapping[str, "_Walk"]) -> list[_Passage]:
        passages: list[_Passage] = []
        for number, message in enumerate(self._messages):
            if message.role != "assistant":
                continue
            parts = _parts(message, found)
            before = passages[-1] if passages and passages[-1].last == number - 1 else None
            if before is not None and parts[0].walk is not None and before.parts[-1].walk is parts[0].walk:
                before.last = number
                before.parts[-1].blocks += parts[0].blocks
                before.parts += parts[1:]
            else:
                passages.append(_Passage(number, number, parts))
        return passages

    def _edits(self, passage: _Passage, between: bytes) -> list[Edit]:
        """What puts back the hidden parts of a passage: messages in place of its own, and parked results into the next one
        of the client, past what the system says (wire.md A3).
        """
        new: list[bytes] = []
        parked: list[Kept] = []
        for part in passage.parts:
            messages, waiting = _put_back(part.contents())
            new += messages
            parked += waiting
        start, end = self._messages[passage.first].start, self._messages[passage.last].end
        rest = range(passage.last + 1, len(self._messages))
        following = next((self._messages[n] for n in rest if self._messages[n].role != "system"), None)
        edits: list[Edit] = []
        if parked and following is not None and following.role == "user" and following.content.startswith(b"["):
            message, content = self.body[following.start : following.end], _with_results(following, parked, between)
            edits.append((following.start, following.end, with_member(message, "content", content)))
        elif parked:
            new.append(written_message("user", (piece.result for piece in parked if piece.result is not None)))
        if new:
            edits.append((start, end, between.join(new)))
        elif rest:  # only thoughts were left, which nobody takes without what they led to
            edits.append((start, self._messages[rest[0]].start, b""))
        return edits


def _objection(top: Members) -> str | None:
    if not is_null(top.get("thread", Raw(b"null"))):
        return "The provider holds the conversation, so the request does not show what was hidden in it."
    return None


# --- putting back -----------------------------------------------------------------------------------------------------


def _parts(message: _Message, found: Mapping[str, "_Walk"]) -> list[_Part]:
    """The pieces of a message by the responses that gave them; what has no key of its own goes with what is before it."""
    if not any(block.key for block in message.blocks):  # the longest of what was said is the newest
        walk = next((found[key] for key in reversed(message.keys) if key in found), None)
        return [_Part(walk, list(message.blocks))]
    parts = [_Part(None, [])]
    for block in message.blocks:
        walk = found.get(block.key or "")
        if walk is not None and parts[-1].walk not in (None, walk):
            parts.append(_Part(None, []))
        parts[-1].walk = parts[-1].walk or walk
        parts[-1].blocks.append(block)
    return parts


class _Walk:
    """Goes along the pieces of one response while what the client replays is gone along, in one message or in several: a
    turn with two calls may come back as two, each with its result behind it.

    What the client has comes back in the provider's bytes, what is hidden comes back once: before what it stood before, and
    not after the message in which its turn begins. A piece that is not known takes the place of one of its kind that is
    missing, else it comes as late as it can: what broke off after a call stands after the call's result.

    `turns` are those of the response: none where nothing was hidden, None where what was is lost.
    """

    def __init__(self, memory: Memory) -> None:
        self.toolset = memory.toolset
        self.turns = _turns_of(memory)
        self._pieces: list[tuple[int, Kept, Block]] = []  # with the number of the turn
        self._ends: list[int] = []  # of the turns, among the pieces
        for number, turn in enumerate(self.turns or ()):
            self._pieces += ((number, piece, Block.read(piece.raw)) for piece in turn)
            self._ends.append(len(self._pieces))
        self._places: dict[tuple[str, str], list[int]] = {}  # of the pieces that can be met, the next one at the end
        self._texts: list[int] = []  # likewise
        for place in reversed(range(len(self._pieces))):
            _, piece, block = self._pieces[place]
            if piece.result is None:
                self._places.setdefault((block.kind, block.identity), []).append(place)
                if block.kind == "text" and block.word:
                    self._texts.append(place)
        self._met = 0  # the client's pieces before it were met, or are not going to be
        self._restored = 0  # the hidden pieces before it are back
        self._contents: dict[int, list[Kept]] = {}

    def take(self, blocks: Iterable[Block], *, is_last: bool) -> Iterable[Sequence[Kept]]:
        """The content of each turn, and of what follows them, for pieces that the client replays next to each other."""
        self._contents = {}
        strange: list[Block] = []
        for block in blocks:
            places = self._find(block)
            if not places:
                strange.append(block)
            for place in places:
                self._go_on(place, strange)
                strange = []
                number, piece, kept = self._pieces[place]
                mark = block.mark if place == places[-1] else None
                self._add(number, Kept(block.raw if _is_edited(block, kept) else _marked(piece.raw, mark)))
                self._met = place + 1
        if is_last:
            self._go_on(len(self._pieces), strange)
        else:
            self._come_to(self._ends[self._pieces[self._met - 1][0]] if self._met else 0, strange)
        return self._contents.values()

    def _find(self, block: Block) -> list[int]:
        """Where it stands among the pieces still to come. A text may be several that the client made one of."""
        places = self._places.get((block.kind, block.identity), [])
        for passed in (places, self._texts):
            while passed and passed[-1] < self._met:
                passed.pop()
        if places:
            return [places[-1]]
        joined: list[int] = []
        length = 0
        for place in reversed(self._texts if block.kind == "text" else ()):
            word = self._pieces[place][2].word
            if not block.word.startswith(word, length):
                break
            joined.append(place)
            length += len(word)
        return joined if length == len(block.word) else []

    def _go_on(self, end: int, strange: list[Block]) -> None:
        """To a piece, past those that the client left out or has others for."""
        used = 0
        for place in range(self._met, end):
            number, piece, block = self._pieces[place]
            if piece.result is None and used < len(strange) and strange[used].kind == block.kind:
                self._restore(place)
                self._add(number, Kept(strange[used].raw))
                used += 1
        self._come_to(end, strange[used:])

    def _come_to(self, end: int, strange: list[Block]) -> None:
        self._restore(end)
        number = self._pieces[end][0] if end < len(self._pieces) else len(self._ends)
        for block in strange:
            self._add(number, Kept(block.raw))

    def _restore(self, end: int) -> None:
        for number, piece, _ in self._pieces[self._restored : end]:
            if piece.result is not None:
                self._add(number, piece)
        self._restored = max(self._restored, end)

    def _add(self, number: int, piece: Kept) -> None:
        self._contents.setdefault(number, []).append(piece)


def _turns_of(memory: Memory) -> list[list[Kept]] | None:
    if memory.data == b"":
        return []
    try:
        return None if memory.data is None else _turns.decode(memory.data)
    except msgspec.MsgspecError:
        return None


def _marked(raw: bytes, mark: bytes | None) -> bytes:
    return raw if mark is None else with_member(raw, "cache_control", mark)


def _is_edited(block: Block, kept: Block) -> bool:
    """Whether the client wants something else to have been called, as when it clears what a call wrote."""
    return block.is_call and block.raw != kept.raw and block.called() != kept.called()


def _put_back(contents: Iterable[Sequence[Kept]]) -> tuple[list[bytes], list[Kept]]:
    """The messages of turns with what was hidden in them, and the turns whose results the client's have to join."""
    messages: list[bytes] = []
    content: list[bytes] = []
    parked: list[Kept] = []
    for pieces in contents:
        content += (piece.raw for piece in pieces)
        results = [piece.result for piece in pieces if piece.result is not None]
        if results and any(piece.result is None and Block.read(piece.raw).kind == "tool_use" for piece in pieces):
            parked += pieces
        elif results:
            messages += [*assistant_message(content), written_message("user", results)]
            content = []
    return [*messages, *assistant_message(content)], parked


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
    """The request without any thinking, also where the client is in a loop of its own tools.

    What was thought after the gap is bound to what stood in it. What was thought before could stay, but then what is thought
    from now on would be bound to a history without the middle, and nothing would tell it from the rest in later requests.
    Dropping all of it stays valid each time (wire.md A6).
    """
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
