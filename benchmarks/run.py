"""`make bench`: Rewire measured against the untouched model, in one interleaved run.

python benchmarks/run.py [--only apply,load,forward,modular,packed] [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parent / "results"
GROUPS = ("apply", "load", "forward", "modular", "packed", "convert")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from suite import machine, report
    from suite.timing import Effort

    started = time.perf_counter()
    effort = Effort(quick=options.quick)
    with machine.priority() as priority:
        facts = machine.facts(priority)
        limits = machine.limits(effort)
        results = [result for name in options.only for result in measure(name, effort)]
    facts["load average at the end"] = machine.load_average()
    run = report.Run(facts, limits, results, time.perf_counter() - started, options.quick)
    print(f"written: {', '.join(map(str, report.write(run, options.out)))}")
    wrong = [result.title for result in results if not result.is_right]
    if wrong:
        print(f"WRONG RESULTS: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure Rewire against untouched models.")
    parser.add_argument("--only", type=chosen, default=GROUPS, help=f"some of {', '.join(GROUPS)}, with commas")
    parser.add_argument("--quick", action="store_true", help="few rounds, no full-size SAM: a look, not a result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args(arguments)


def chosen(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(GROUPS):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(GROUPS)}")
    return names


def measure(name: str, effort: object) -> list[object]:
    """Runs one group of benchmarks; every group is a module with a function `run`."""
    from suite import report

    results = []
    for result in import_module(f"suite.{name}").run(effort):
        print(f"{name}: {report.line(result)}", flush=True)
        results.append(result)
    return results


if __name__ == "__main__":
    raise SystemExit(main())
