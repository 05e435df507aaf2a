"""Launchers under faults: seconds until training goes on after each, on three hosts of this machine.

    python -m bench.launch [--systems torchelastic torchft ...] [--faults rank host ...] --out FOLDER

Needs root, for the hosts are network namespaces (tests/hosts.py), and `pip install torchft-nightly` for torchft. Each
trial adds a JSON line to FOLDER/outcomes.jsonl, with the load of the machine, and a folder with the logs of its hosts.
Prints the table of all these lines, the median where a fault was tried several times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.launch.faults import FAULTS
from bench.launch.measure import LIMIT_SECONDS, Outcome, measure, trials
from bench.launch.systems import SYSTEMS


def cell(outcomes: Sequence[Outcome], mended: bool) -> str:
    """The outcomes of one launcher under one fault, in words for a table."""
    again = [one.again_seconds for one in outcomes if one.again_seconds is not None]
    whole = [one.whole_seconds for one in outcomes if one.whole_seconds is not None]
    if outcomes and all(one.stood_still for one in outcomes):
        return "stands still, goes on when it is back"
    words = [_seconds(again, len(outcomes))] if outcomes else ["not measured"]
    if (again or whole) and (mended or any(one.again_world < 3 for one in outcomes)):
        words.append(f"three {'again: ' if mended else 'at '}{_seconds(whole, len(outcomes))}")
    if stale := sum(one.stale_commits > 0 for one in outcomes):
        words.append(f"old commits in {stale} of {len(outcomes)}")
    return "; ".join(words)


def _seconds(values: Sequence[float], tries: int) -> str:
    if not values:
        return f"not in {LIMIT_SECONDS:g} s"
    missing = f" ({len(values)} of {tries} tries)" if len(values) < tries else ""
    return f"{statistics.median(values):.1f} s{missing}"


def table(path: Path) -> str:
    """The table of the outcomes in `path`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    systems = [name for name in SYSTEMS if any(row["system"] == name for row in rows)]
    lines = ["| fault | " + " | ".join(systems) + " |", "|---" * (len(systems) + 1) + "|"]
    for name, fault in FAULTS.items():
        cells = []
        for system in systems:
            found = [Outcome(**row["outcome"]) for row in rows if (row["system"], row["fault"]) == (system, name)]
            cells.append(cell(found, fault.mend is not None))
        lines.append(f"| {fault.words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    outcomes = asked.out / "outcomes.jsonl"
    for system in asked.systems:
        for fault in asked.faults:
            with trials(SYSTEMS[system], asked.out.resolve(), f"{system}-{fault}") as trial:
                outcome = asdict(measure(trial, FAULTS[fault]))
            of, load = SYSTEMS[system].versions(), round(os.getloadavg()[0], 1)
            line = json.dumps({"system": system, "fault": fault, "of": of, "load": load, "outcome": outcome})
            print(line, file=sys.stderr)
            with open(outcomes, "a") as lines:
                lines.write(line + "\n")
    print(table(outcomes))


if __name__ == "__main__":
    main()
