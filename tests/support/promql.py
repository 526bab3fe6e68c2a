"""PromQL, read as far as it takes to say what an expression looks at: which series, by which labels.

Grammar: prometheus.io/docs/prometheus/latest/querying/basics and .../operators. What is not understood is an error, so
nothing is passed over. Variables of Grafana (``$name``) may stand in strings and for durations.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

_TOKEN: Final = re.compile(
    r"""
      (?P<space>\s+)
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<duration>\d+(?:ms|[smhdwy])(?:\d+(?:ms|[smhdwy]))*\b|\$__\w+)
    | (?P<number>\d+(?:\.\d+)?)
    | (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    | (?P<operator>=~|!~|==|!=|>=|<=|[-+*/%^<>=])
    | (?P<mark>[(){}\[\],])
    """,
    re.VERBOSE,
)
_FUNCTIONS: Final = {
    "absent",
    "changes",
    "histogram_quantile",
    "increase",
    "last_over_time",
    "max",
    "min",
    "rate",
    "sum",
    "time",
    "topk",
    "vector",
}
_GROUPING: Final = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS: Final = {"and", "or", "unless", "bool", "offset"}
_MATCHERS: Final = {"=", "!=", "=~", "!~"}


@dataclass(frozen=True)
class Selector:
    """A metric, and what the labels of its series must be."""

    metric: str
    matchers: Sequence[tuple[str, str, str]] = ()
    """Label, operator, value."""


@dataclass(frozen=True)
class Query:
    """What an expression looks at. `by` are the labels that its aggregations keep, `on` those that it joins by."""

    selectors: list[Selector] = field(default_factory=list)
    by: set[str] = field(default_factory=set)
    on: set[str] = field(default_factory=set)


class _Tokens:
    """The tokens of an expression, with a look at the next one."""

    def __init__(self, expression: str) -> None:
        self._tokens = [*_split(expression), ("end", "")]
        self._at = 0

    @property
    def next(self) -> str:
        return self._tokens[self._at][1]

    def take(self, kind: str | None = None, text: str | None = None) -> str:
        found_kind, found = self._tokens[self._at]
        if (kind is not None and found_kind != kind) or (text is not None and found != text):
            raise ValueError(f"{found!r} where there should be {text or kind}")
        self._at += 1
        return found

    def any(self) -> tuple[str, str]:
        found = self._tokens[self._at]
        self._at += 1
        return found


def read(expression: str) -> Query:
    """What an expression looks at. Raises ValueError where it is not understood."""
    query = Query()
    tokens = _Tokens(expression)
    while (token := tokens.any())[0] != "end":
        kind, text = token
        if kind == "mark" and text == "{":
            raise ValueError("a selector without a metric")
        if kind != "name" or text in _WORDS:
            continue
        if text in _GROUPING:
            (query.by if text in ("by", "without") else query.on).update(_labels(tokens))
        elif tokens.next == "(" or tokens.next in _GROUPING:
            if text not in _FUNCTIONS:
                raise ValueError(f"there is no function {text!r}")
        else:
            query.selectors.append(Selector(text, tuple(_matchers(tokens)) if tokens.next == "{" else ()))
    return query


def _split(expression: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(expression):
        found = _TOKEN.match(expression, at)
        if found is None or found.lastgroup is None:
            raise ValueError(f"not understood: {expression[at : at + 20]!r}")
        at = found.end()
        if found.lastgroup != "space":
            yield found.lastgroup, found.group()


def _labels(tokens: _Tokens) -> Iterator[str]:
    tokens.take(text="(")
    while tokens.next != ")":
        yield tokens.take("name")
        if tokens.next != ")":
            tokens.take(text=",")
    tokens.take(text=")")


def _matchers(tokens: _Tokens) -> Iterator[tuple[str, str, str]]:
    tokens.take(text="{")
    while tokens.next != "}":
        label, operator, value = tokens.take("name"), tokens.take("operator"), tokens.take("string")
        if operator not in _MATCHERS:
            raise ValueError(f"{operator!r} is no way to match a label")
        yield label, operator, value[1:-1]
        if tokens.next != "}":
            tokens.take(text=",")
    tokens.take(text="}")
