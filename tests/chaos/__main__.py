"""``python -m tests.chaos``: bring every fault about, print what was observed, write the table of docs/reliability.md."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from .chapters import CHAPTERS
from .play import play
from .report import line, written_into
from .scenario import SMALL, WHOLE


def main() -> int:
    """Play the suite. Answers 1 where something that is promised does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--small", action="store_true", help="on the scale of the suite of tests")
    parser.add_argument("--only", default="", metavar="WORDS", help="scenarios that have this in their chapter or fault")
    parser.add_argument("--output", type=Path, help="the document whose table is made anew of what was observed")
    given = parser.parse_args()
    played = []
    for chapter in CHAPTERS:
        chosen = [one for one in chapter.scenarios if given.only in f"{chapter.title}: {one.fault}"]
        if chosen:
            print(f"\n{chapter.title}", flush=True)
        for one in play(replace(chapter, scenarios=chosen), SMALL if given.small else WHOLE):
            print(line(one), flush=True)
            played.append(one)
    failed = [one for one in played if not one.held]
    not_played = [one for one in played if one.observed is None]
    print(
        f"\n{len(played)} faults, {len(failed)} that cost more than is promised, {len(not_played)} that could not be played."
    )
    if given.output is not None and not failed and not given.only:
        given.output.write_text(written_into(given.output.read_text(), played))
    return 1 if failed or not played else 0


if __name__ == "__main__":
    sys.exit(main())
