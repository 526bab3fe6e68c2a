"""``python -m benchmarks``: measure, print the table, write the results."""

import argparse
import sys
from pathlib import Path

import msgspec

from benchmarks.machine import allow_many_files
from benchmarks.plot import svg
from benchmarks.report import table, targets
from benchmarks.subjects import SUBJECTS
from benchmarks.suite import FULL, QUICK, Suite
from benchmarks.tooling import BUILD, CannotMeasure, build


def main() -> int:
    """Run the suite; 1 where something that must work did not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What the gateway costs, beside others.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: under two minutes")
    parser.add_argument("--output", type=Path, default=BUILD / "results", help="where to write latest.json and latest.svg")
    parser.add_argument("--only", nargs="+", default=[], choices=[kind.name for kind in SUBJECTS], help="these subjects")
    options = parser.parse_args()
    allow_many_files()
    try:
        build("provider")
        build("load")
    except CannotMeasure as error:
        print(error, file=sys.stderr)
        return 1
    kinds = [kind for kind in SUBJECTS if not options.only or kind.name in options.only]
    suite = Suite(kinds, QUICK if options.quick else FULL, lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    for name, reason in suite.results.absent.items():
        print(f"{name}: {reason}", file=sys.stderr)
    results = suite.run()
    options.output.mkdir(parents=True, exist_ok=True)
    base = options.output / ("quick" if options.quick else "latest")
    base.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    base.with_suffix(".svg").write_text(svg(results))
    print("\n".join(["", *table(results), "", *targets(results), ""]))
    for problem in results.problems:
        print(problem)
    print(f"written: {base}.json and .svg")
    return 1 if any(problem.startswith("aibridge") for problem in results.problems) else 0


if __name__ == "__main__":
    sys.exit(main())
