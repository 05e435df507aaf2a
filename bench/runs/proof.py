"""The full proof of the layouts: each one up to a number of processes, against one device. Long; run by hand.

    make proof                             every layout of 1, 2, 4 and 8 processes
    python -m bench.runs.proof --most 4    of 1, 2 and 4

Degrees x schedules x recompute x tied or untied embeddings, each 20 steps of AdamW in fp32, with uneven padding of the
samples. Prints a row per layout, and exits with 1 if one differs from one device by more than 1e-5.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from meshwright.launch import Context
from meshwright.layout import RECOMPUTE, Layout
from meshwright.plan.rules import FRAMEWORKS
from tests.worlds import GLOBAL_BATCH, Case, Distance, compare, train_cases, train_one

TOLERANCE = 1e-5
SIZES = (1, 2, 4, 8)
AT_ONCE = 12  # cases that share one set of processes
#: Untied and tied embeddings, both with sizes that four tensor-parallel ranks divide, and four blocks for the stages.
SHAPES = ("fourfold", "tied fourfold")


def layouts(processes: int) -> Iterator[Layout]:
    """Every layout of `processes` that the test model (four key heads, four blocks) allows."""
    divisors = [degree for degree in SIZES if processes % degree == 0]
    for dp, tp, pp in itertools.product(divisors, repeat=3):
        if dp * tp * pp != processes or tp > 4 or pp > 4:
            continue
        for shard in (degree for degree in divisors if dp % degree == 0):
            for sequence_parallel in (False, True) if tp > 1 else (False,):
                for schedule in FRAMEWORKS["meshwright"].offers.schedules if pp > 1 else ("1f1b",):
                    for recompute in RECOMPUTE:
                        yield Layout(
                            dp=dp,
                            shard=shard,
                            tp=tp,
                            pp=pp,
                            sequence_parallel=sequence_parallel,
                            schedule=schedule,
                            recompute=recompute,
                            micro_batch=max(1, GLOBAL_BATCH // (dp * max(2, pp))),
                        )


def prove(cases: list[Case], folder: Path) -> dict[str, Distance | str]:
    """Case name -> its distance from one device, or the text of its error."""
    results: dict[str, Distance | str] = {}
    references = {
        shape: train_one(Case(Layout(micro_batch=GLOBAL_BATCH), shape), Context.alone(), folder / shape)
        for shape in sorted({case.shape for case in cases})
    }
    try:
        trained = train_cases(cases, folder / "layouts", seconds=1800)
        results.update({case.name: compare(references[case.shape], trained[case.name]) for case in cases})
    except Exception as error:  # reported in the table, so that one failure does not hide the other layouts
        for case in cases:
            results[case.name] = f"{type(error).__name__}: {error}" if len(cases) == 1 else "retry"
    return results


def main() -> int:
    """Runs the proof; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=SIZES[-1], choices=SIZES, help="largest number of processes")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wrong = count = 0
    begin = time.monotonic()
    print(f"{'layout':<64} {'loss':>8} {'norm':>8} {'gradient':>9} {'step 1':>8}")
    for processes in (size for size in SIZES if size <= options.most):
        cases = [Case(layout, shape) for layout in layouts(processes) for shape in SHAPES]
        for start in range(0, len(cases), AT_ONCE):
            group = cases[start : start + AT_ONCE]
            for case, distance in in_folder(group).items():
                count += 1
                wrong += show(case, distance)
    print(f"{count} layouts, {wrong} wrong, {time.monotonic() - begin:.0f} s")
    return 1 if wrong else 0


def in_folder(group: list[Case]) -> dict[str, Distance | str]:
    """`prove` in a temporary folder. If a group fails, each of its cases runs by itself."""
    folder = Path(tempfile.mkdtemp(prefix="meshwright-proof-"))
    try:
        results = prove(group, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "retry" in results.values():
        return {name: distance for case in group for name, distance in in_folder([case]).items()}
    return results


def show(name: str, distance: Distance | str) -> bool:
    """Prints the row of a layout. Returns whether it is wrong."""
    if isinstance(distance, str):
        print(f"{name:<64} FAILED {distance}", flush=True)
        return True
    figures = (distance.loss, distance.norm, distance.gradient, distance.first_gradient)
    bad = not all(figure <= TOLERANCE for figure in figures)
    where = f"  WRONG: {distance.gradient_where}; at step 1 {distance.first_where}" if bad else ""
    print("{:<64} {:8.1e} {:8.1e} {:9.1e} {:8.1e}{}".format(name, *figures, where), flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
