"""The table: of what was observed, for the terminal and for docs/reliability.md."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Final

from .play import Played

BEGIN: Final = "<!-- what follows is made by `make chaos`: do not edit -->"
END: Final = "<!-- end of what is made -->"


def line(played: Played) -> str:
    """One scenario, for the terminal."""
    mark = "ok  " if played.held else "FAIL"
    if played.observed is None:
        return f"  --    {played.scenario.fault}: {played.why_not}"
    said = f"  {mark}  {played.scenario.fault} ({played.seconds:.1f} s)\n        {_cells(played)}"
    return said if played.held else f"{said}\n        promised: {' | '.join(played.scenario.promised)}"


def _cells(played: Played) -> str:
    assert played.observed is not None
    client, ledger, lost = played.observed.outcome
    beside = f" ({played.observed.beside})" if played.observed.beside else ""
    return f"{client}{beside} | {ledger} | {lost}"


def table(played: Iterable[Played]) -> Iterator[str]:
    """The lines of the document's part that is made: a section for each chapter."""
    for chapter, ones in groupby(played, attrgetter("chapter")):
        yield from ("", f"### {chapter.title}", "", chapter.about, "")
        yield from ("| fault | what the client saw | what the ledger says | lost |", "| --- | --- | --- | --- |")
        for one in ones:
            if one.observed is None:
                yield f"| {one.scenario.fault} | not played: {one.why_not} | | |"
                continue
            yield f"| {one.scenario.fault} | {_cells(one)} |"
    yield ""


def written_into(document: str, played: Sequence[Played]) -> str:
    """The document with its table made anew."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n" + "\n".join(table(played)) + f"\n{END}{after}"


def rows_in(document: str) -> list[list[str]]:
    """The cells of the document's table, row by row: the fault, and what it costs."""
    _, _, rest = document.partition(BEGIN)
    rows = [row[2:-2].split(" | ") for row in rest.partition(END)[0].splitlines() if row.startswith("| ")]
    return [row for row in rows if row[0] not in ("fault", "---")]
