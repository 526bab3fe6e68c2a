"""A run's table and its verdict on the targets, for a terminal."""

from collections.abc import Iterator

from benchmarks.results import ROWS, TARGETS, Results, Row, median, ratio


def table(results: Results) -> Iterator[str]:
    """The rows, with medians and ratios to nginx; the subjects are the columns."""
    subjects = _subjects(results)
    lines = [["", *subjects], *([row.title, *_cells(row, results, subjects)] for row in ROWS if row.key in results.samples)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        yield "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()


def targets(results: Results) -> Iterator[str]:
    """Each target, what was measured, and whether that is enough."""
    for target in TARGETS:
        word, value = target.verdict(results)
        bound = f"{'at least' if target.at_least else 'at most'} {target.limit:g}"
        yield f"{word:12}  {target.title}: {'-' if value is None else f'{value:.2f}'} ({bound})"


def _subjects(results: Results) -> list[str]:
    found = {name for row in results.samples.values() for name in row}
    return [name for name in ("direct", "nginx", "thin", "aibridge", "portkey", "litellm") if name in found]


def _cells(row: Row, results: Results, subjects: list[str]) -> Iterator[str]:
    for subject in subjects:
        values = row.values(results, subject)
        value = median(values)
        if value is None or (row.over_direct and subject == "direct"):
            yield ""
            continue
        cell = f"{value:,.{row.digits}f} {row.unit}"
        times = ratio(values, row.values(results, "nginx")) if row.compare and subject not in ("direct", "nginx") else None
        yield cell if times is None else f"{cell} ({times:,.1f} x)"
