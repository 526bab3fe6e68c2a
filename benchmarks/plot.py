"""A run as a picture: bars on a logarithmic scale, in SVG, without a library for it."""

import math
from collections.abc import Iterator
from html import escape
from typing import Final

from benchmarks.results import ROWS, Results, Row, median

_PANELS: Final = ("cpu_request", "cpu_large_request", "cpu_event", "cpu_burst_event", "latency_p50", "kb_per_stream_1000")
_COLOURS: Final = {"nginx": "#8a8f98", "thin": "#57ab5a", "aibridge": "#1f6feb", "portkey": "#d29922", "litellm": "#cf222e"}
_WIDTH, _LABEL, _VALUE, _BAR, _GAP, _TOP = 760, 90, 110, 18, 34, 64


def svg(results: Results) -> str:
    """The picture: a panel for each of some rows, a bar for each subject, the shortest at least visible."""
    rows = [row for row in ROWS if row.key in _PANELS and row.key in results.samples]
    body: list[str] = []
    height = _TOP
    for row in rows:
        bars = list(_bars(row, results))
        body += _panel(row, bars, height)
        height += _GAP + _BAR * len(bars)
    machine = (
        f"{results.machine['cpu']}, {results.machine['cores']} cores, {results.when}. Logarithmic scale, less is better."
    )
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="12">
<rect width="{_WIDTH}" height="{height}" fill="white"/>
<text x="12" y="24" font-size="16">What a gateway costs</text>
<text x="12" y="42" fill="#57606a">{escape(machine)}</text>
{chr(10).join(body)}
</svg>
"""


def _bars(row: Row, results: Results) -> Iterator[tuple[str, float]]:
    for subject in _COLOURS:
        if (value := median(row.values(results, subject))) is not None:
            yield subject, value


def _panel(row: Row, bars: list[tuple[str, float]], top: int) -> Iterator[str]:
    yield f'<text x="12" y="{top + 14}" font-weight="bold">{escape(row.title)}, {row.unit}</text>'
    for index, (subject, value) in enumerate(bars):
        y, length = top + 20 + index * _BAR, _length(value, [value for _, value in bars])
        yield f'<text x="{_LABEL - 6}" y="{y + 12}" text-anchor="end">{subject}</text>'
        yield f'<rect x="{_LABEL}" y="{y}" width="{length:.0f}" height="{_BAR - 4}" fill="{_COLOURS[subject]}"/>'
        yield f'<text x="{_LABEL + length + 6:.0f}" y="{y + 12}">{value:,.{row.digits}f}</text>'


def _length(value: float, values: list[float]) -> float:
    """A bar's length: the scale begins at half of the least value above nothing."""
    positive = [one for one in values if one > 0]
    if value <= 0 or not positive:
        return 1
    floor = min(positive) / 2
    return (_WIDTH - _LABEL - _VALUE) * math.log(value / floor) / math.log(max(positive) / floor)
