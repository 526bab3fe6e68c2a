"""What a line of the log says, and how: as JSON for programs, or as text for people.

Names of models, of sessions and of users, and errors, come from outside. Whatever they hold, a line stays one line, and does
nothing to a terminal: what cannot be printed (control characters, line breaks of every kind, marks that turn the direction
of writing) is shown as an escape, as Python shows it, and what is too long is cut. In both formats, since JSON is read on
terminals, too.
"""

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final, Literal

import msgspec

from aibridge.records import Status

LogFormat = Literal["auto", "console", "json"]
"""``auto`` is ``console`` on a terminal, and ``json`` where a program reads: that takes a third of the time, too."""
LogLevel = Literal["debug", "info", "warning", "error", "critical"]

MAX_NAME: Final = 200
"""Characters of what is called somehow outside: a model, a session, a user."""
MAX_TEXT: Final = 2000
"""Characters of an error, or of a message."""
MAX_EXCEPTION: Final = 8000
"""Characters of a traceback. A line then stays below the 16 KB after which container engines cut (moby, ``copier.go``)."""


class LogLine(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Any line. What is None is absent. `worker` is the number of the one among several that says it."""

    time: datetime
    level: LogLevel
    logger: str
    worker: int | None = None
    message: str
    exception: str | None = None
    """A traceback, of several lines."""


class InterceptionLine(LogLine, omit_defaults=True, kw_only=True, gc=False):
    """That an interception has started: what it is about. Or that it has ended: also what has become of it."""

    interception_id: str
    actor: str
    provider: str
    model: str | None = None
    route: str
    streaming: bool
    client: str | None = None
    session: str | None = None
    status: Status | None = None
    http_status: int | None = None
    error: str | None = None
    duration_ms: float | None = None
    time_to_first_byte_ms: float | None = None
    commit_ms: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None
    hops: int | None = None
    attempts: int | None = None
    injected_tool_calls: int | None = None
    other_tool_calls: int | None = None


class IncidentLine(LogLine, omit_defaults=True, kw_only=True, gc=False):
    """Something that an operator may want to know: a retry, a refusal, another state of a circuit breaker."""

    provider: str | None = None
    route: str | None = None
    model: str | None = None
    actor: str | None = None
    peer: str | None = None
    interception_id: str | None = None
    reason: str | None = None
    detail: str | None = None
    count: int | None = None
    state: str | None = None
    delay_ms: float | None = None


def plain(text: str, limit: int = MAX_NAME) -> str:
    """Text that can be printed, in one line, of up to `limit` characters (and what escapes take)."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text if text.isprintable() else "".join(map(_escaped, text))


def plain_lines(text: str, limit: int) -> str:
    """Text of several lines that can be printed. Where it is too long, something of its first half is left out: the end says
    what went wrong.
    """
    if len(text) > limit:
        text = f"{text[: limit // 4]}\n…\n{text[-3 * limit // 4 :]}"
    return "\n".join(plain(line, limit) for line in text.expandtabs().split("\n"))


def _escaped(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


_json: Final = msgspec.json.Encoder()


def as_json(line: LogLine) -> bytes:
    """A line as a JSON object."""
    return _json.encode(line) + b"\n"


class Console:
    """Lines as text: the local time, the level, who says it, the message, and then the other fields by name.

    The level has colours where that is asked for.
    """

    def __init__(self, *, colours: bool = False) -> None:
        self._levels = {level: f"{level.upper():<8}" for level in _COLOURS}
        if colours:
            self._levels = {level: f"\x1b[{_COLOURS[level]}m{name}\x1b[0m" for level, name in self._levels.items()}

    def __call__(self, line: LogLine) -> bytes:
        """A line as text. What has several lines goes on indented, so that nothing in it looks like a line of its own."""
        when, milliseconds = divmod(int(line.time.timestamp() * 1000), 1000)
        who = line.logger if line.worker is None else f"{line.logger} [worker {line.worker}]"
        text = f"{_local(when)}.{milliseconds:03} {self._levels[line.level]} {who}: {line.message}"
        kind = type(line)
        if kind is not LogLine:
            names, values = _OWN_FIELDS[kind]
            shown = zip(names, values(line), strict=True)
            text += "".join([name + _SHOWN[type(value)](value) for name, value in shown if value is not None])
        if line.exception is not None:
            text += f"\n{line.exception}"
        return text.replace("\n", "\n    ").encode() + b"\n"


_COLOURS: Final[dict[LogLevel, str]] = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}


_Own = tuple[Sequence[str], Callable[[LogLine], Sequence[Any]]]


def _own_fields(kind: type[LogLine]) -> _Own:
    names = [name for name in kind.__struct_fields__ if name not in LogLine.__struct_fields__]
    return [f" {name}=" for name in names], attrgetter(*names)


_OWN_FIELDS: Final[dict[type[LogLine], _Own]] = {kind: _own_fields(kind) for kind in (InterceptionLine, IncidentLine)}


@lru_cache(maxsize=16)
def _local(seconds: int) -> str:
    """The local time, which many lines have in common."""
    return datetime.fromtimestamp(seconds).isoformat(" ")  # noqa: DTZ006  people's own time, as the console's user has it


def _shown_text(text: str) -> str:
    """Quoted where it would not be seen where it ends."""
    return _json.encode(text).decode() if not text or _AMBIGUOUS.search(text) else text


_AMBIGUOUS: Final = re.compile(r'[ "=\\]')
_SHOWN: Final[dict[type, Callable[[Any], str]]] = {
    str: _shown_text,
    bool: lambda value: "true" if value else "false",
    int: str,
    float: str,
}
