"""`calibrate`: a profile of constants from measured cases, from a run, or from this machine."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import InputError, Problem
from meshwright.verbs.plan import profile_of
from meshwright.verbs.start import card_of_job, cluster_of_job

if TYPE_CHECKING:
    from meshwright.plan.constants import Profile

#: How long `calibrate` measures a machine by default.
MEASURED_SECONDS = 30.0

logger = logging.getLogger("meshwright")


def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    profile: str | Path | None = None,
    datasheet: bool = False,
    seconds: float = MEASURED_SECONDS,
) -> dict[str, Any]:
    """Makes a profile and writes it to `out`. Returns {"out", "from", ...}.

    `source` is one of: a file of measured cases, which constants are fitted to ("rows", "moved", "mean_error",
    "intervals"); a run folder, which corrects the plan behind it ("steps", "noise", "factors", "parts", "changed",
    "interval"); or "machine", which measures this machine for about `seconds` ("changed", "seconds", and under "busy"
    what could not be measured because of other work). All start from the shipped profile, from `profile`, or from the
    data sheets. An existing profile at `out` is replaced. Raises InputError where the source cannot be used, and,
    before any work, where `out` is another kind of file.
    """
    machine = str(source) == "machine"
    if not machine and seconds != MEASURED_SECONDS:
        what = "--seconds is for `calibrate machine` alone"
        raise InputError(Problem("command line", what, "leave out --seconds, or calibrate machine"))
    path, start = Path(out), profile_of(profile, datasheet=datasheet)
    target = _profile_target(path, None if machine else Path(source))
    if machine:
        result, summary = _from_machine(path, start, seconds)
    elif Path(source).is_dir():
        result, summary = _from_run(Path(source), path, start)
    else:
        result, summary = _from_cases(source, path, start)
    note = ""
    if "raw" in summary:  # the measurements behind the constants
        note = "Measured (JSON): " + json.dumps(summary["raw"], separators=(",", ":"))
    try:
        result.save(target, note)
    except OSError as error:
        raise InputError(Problem(str(path), f"cannot be written ({error.strerror})", "name another file")) from error
    return {"out": str(path), **summary}


def _profile_target(path: Path, source: Path | None) -> Path:
    """The file that `path` leads to, links followed. Raises InputError where writing it would destroy the source, or a
    file that is not a profile."""
    from meshwright.plan.constants import load_profile

    target, hint = Path(os.path.realpath(path)), "name another file"
    if not target.parent.is_dir():
        raise InputError(Problem(str(path), "its folder does not exist", "name a file in a folder that does"))
    if source is not None:
        origin = Path(os.path.realpath(source))
        if target == origin:
            raise InputError(Problem(str(path), "is what the profile is made from", hint))
        if origin.is_dir() and target.is_relative_to(origin):
            raise InputError(Problem(str(path), f"lies in the run folder {source}", f"{hint}, outside it"))
    if os.path.exists(target) and not target.is_file():
        raise InputError(Problem(str(path), "exists and is not a regular file", hint))
    if os.path.exists(target):
        try:
            load_profile(target)
        except InputError as error:
            what = f"exists and is not a profile ({error.problems[0].what})"
            raise InputError(Problem(str(path), what, f"{hint}, or move it away")) from error
    return target


def _from_cases(source: str | Path, path: Path, start: Profile) -> tuple[Profile, dict[str, Any]]:
    from meshwright.plan.calibrate import calibrate as fit
    from meshwright.plan.calibrate.plausible import plausible_cases
    from meshwright.plan.cases import measured_cases

    cases, bad = measured_cases(source)
    good, implausible = plausible_cases(cases, start, str(source))
    try:
        fitted = fit(good, start, name=path.stem, skipped=[*bad, *implausible])
    except InputError as error:
        raise InputError([replace(problem, where=str(source)) for problem in error.problems]) from error
    return fitted.profile, {"from": "cases", **fitted.as_dict()}


def _from_machine(path: Path, start: Profile, seconds: float) -> tuple[Profile, dict[str, Any]]:
    """The profile of this machine; "raw" holds the measurements, "busy" sentences on how other work disturbed them."""
    from meshwright import probe
    from meshwright.cluster import cpu_cluster, this_machine
    from meshwright.plan.calibrate import machine_profile
    from meshwright.plan.calibrate.from_machine import changes, disturbances

    raw = probe.machine(seconds)
    cluster = cpu_cluster() if raw["kind"] == "cpu" else this_machine()
    result = machine_profile(raw, cluster, start, path.stem)
    changed, busy = [change.as_dict() for change in changes(start, result)], list(disturbances(raw))
    for words in busy:
        logger.warning(words)
    return result, {"from": "machine", "seconds": raw["seconds"], "busy": busy, "changed": changed, "raw": raw}


def _from_run(folder: Path, path: Path, start: Profile) -> tuple[Profile, dict[str, Any]]:
    from meshwright.job import load_job
    from meshwright.plan import Plan, Workload
    from meshwright.plan.calibrate import TrainedRun, run_profile
    from meshwright.run import RunFolder

    run = RunFolder(folder)
    for file in (run.job, run.plan, run.events):
        if not file.is_file():
            what = f"is not a run folder: it has no {file.name}"
            raise InputError(Problem(str(folder), what, "name the folder that `train` made, or a file of cases"))
    job = load_job(run.job, data_must_exist=False)
    chosen = Plan.read(run.plan).chosen
    card, cluster = card_of_job(job), cluster_of_job(job)
    workload = Workload(card, cluster, job.train.global_batch, chosen.precision)
    trained = TrainedRun(workload, chosen.layout, chosen.compiled, chosen.predicted.step_seconds.mid)
    fitted = run_profile(run, trained, start, path.stem)
    return fitted.profile, {"from": "run", **fitted.as_dict()}
