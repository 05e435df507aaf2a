"""The planning half of the top floor: a job read and planned, cases predicted, profiles calibrated.

As in verbs.py, which offers these by the same names, each function joins the parts by name and prints nothing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import CannotWork, InputError, Problem

if TYPE_CHECKING:
    from meshwright.card import Card
    from meshwright.cluster import Cluster
    from meshwright.job import Job
    from meshwright.plan import Plan, PlanRequest
    from meshwright.plan.advice import Advice
    from meshwright.plan.groups import MixedCluster
    from meshwright.plan.profile import Profile
    from meshwright.plan.strategies import Planned, Reading

#: Of data that nobody has read yet: bytes of text that a token stands for (about as many in English, by a tokenizer of
#: tens of thousands), bytes of a token's number at most, and the digits, images of 8 x 8 numbers.
TEXT_BYTES, TOKEN_BYTES = 4, 4
DIGITS, DIGIT_BYTES = 1797, 256
#: Files of a folder whose sizes are asked for, at most.
FILES_COUNTED = 5_000
#: How long `calibrate` measures a machine, unless told.
MEASURED_SECONDS = 30.0

logger = logging.getLogger("meshwright")


def read_job(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    data_must_exist: bool = True,
    rest_plan: Callable[[Job], object] | None = None,
) -> Job:
    """The Job itself, or the one in a file with overrides on top.

    Raises InputError listing every problem, those too that `rest_plan` (default: `plan`) of the rest of the job meets.
    """
    from meshwright.job import Job, load_job, sound_part

    if isinstance(job, Job):
        if overrides:
            raise InputError(Problem("overrides", "are for job files", "give the values to Job(...)"))
        return job
    try:
        return load_job(job, overrides, data_must_exist=data_must_exist)
    except InputError as error:
        problems = list(error.problems)
        try:
            rest = sound_part(job, overrides)
            if rest is not None and rest.model.module is None:  # a module would be run to learn what it is
                (rest_plan or plan)(rest)
        except (InputError, CannotWork) as further:
            problems += [problem for problem in further.problems if problem not in problems]
        raise InputError(problems) from None


def each(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns; where some raise InputError or CannotWork, one error with the problems of all."""
    results, failures = [], []
    for call in calls:
        try:
            results.append(call())
        except (InputError, CannotWork) as error:
            failures.append(error)
    if failures:
        kind = InputError if any(isinstance(error, InputError) for error in failures) else CannotWork
        raise kind([problem for error in failures for problem in error.problems]) from failures[0]
    return results


@contextmanager
def placed(job: Job) -> Iterator[None]:
    """Adds, to a problem with a key of the job, the place where the key was said: "job.toml:12: data.source"."""
    try:
        yield
    except (InputError, CannotWork) as error:
        raise type(error)([replace(one, where=place(job, one.where)) for one in error.problems]) from error


def place(job: Job, key: str) -> str:
    said = job.origins.get(key, "default")
    return key if said in ("default", "Python") else f"{said}: {key}"


def card_of_job(job: Job, style: str = "plain") -> Card:
    """What the job's model is: read from a table for a family or a Hugging Face folder, traced for a module. `style`
    says who computes it, where that is known."""
    with placed(job):
        if job.model.module is not None:
            from meshwright import trace

            return trace.card_of_job(job)
        from meshwright import families

        return families.card_of_job(job, style)


def cluster_of_job(job: Job) -> Cluster:
    """What the job runs on: this machine, or a device of the table."""
    if job.cluster.groups:
        what = "devices of several kinds can only be planned for"
        hint = "name one kind: cluster.named and cluster.devices"
        raise CannotWork(Problem(place(job, "cluster.groups"), what, hint))
    from meshwright.cluster import resolve_cluster

    with placed(job):
        cluster = resolve_cluster(job.cluster)
    return (
        cluster
        if job.cluster.dollars_per_hour is None
        else replace(cluster, dollars_per_hour=job.cluster.dollars_per_hour)
    )


def advice(job: Job | str | Path, overrides: Sequence[str] = (), *, experience: str = "some") -> Advice:
    """Strategies and tools that suit the job's model, data, hardware and a team's `experience` (new, some or expert).

    The job is planned under each framework that could run it. Raises CannotWork where none of them has a layout.
    """
    from meshwright.plan.advice import advise, frameworks, situation

    sound = read_job(job, overrides, data_must_exist=False)
    card, cluster = each(lambda: card_of_job(sound), lambda: cluster_of_job(sound))
    facts = situation(
        card,
        cluster,
        _reading(sound, card),
        built_in=sound.model.module is None,
        experience=experience,
        untrained=_untrained(sound),
        pinned=frozenset(sound.layout.pins()),
    )
    return advise(facts, {row: _planned(sound, card, cluster, row) for row in frameworks(facts)})


def _planned(job: Job, card: Card, cluster: Cluster, framework: str) -> Planned | CannotWork:
    """The best layout under a framework, or why there is none. `card` is the job's own."""
    from meshwright.plan import make_plan
    from meshwright.plan.strategies import Planned

    if job.model.module is None:  # a traced module has one card for all
        card = card_of_job(job, _style(framework, job.train.precision))
    try:
        chosen = make_plan(card, cluster, _request(job, framework, "time"), what_if=False, suggest=False).chosen
    except CannotWork as error:
        return error
    return Planned(framework, chosen.predicted.step_seconds.mid, chosen.layout)


def _untrained(job: Job) -> str:
    """What `train` trains, where the job's model is none of it."""
    from meshwright.families import require_trainable

    try:
        require_trainable(job)
    except CannotWork as error:
        return error.problems[0].nearest
    return ""


def _reading(job: Job, card: Card) -> Reading:
    """What a run of the job reads, as far as it can be told without reading any of it."""
    from meshwright.plan.strategies import Reading

    tokens = card.unit == "tokens"
    source, size = job.data.source, None
    per_unit = (1 if job.data.tokenizer == "bytes" else TEXT_BYTES, TOKEN_BYTES) if tokens else (0, 0)
    if source == "digits":
        size, per_unit = DIGITS * DIGIT_BYTES, (DIGIT_BYTES, DIGIT_BYTES)
    elif source == "stdlib":
        from meshwright.data.sources import open_source

        source, size = "Python's standard library", open_source(source, job.data.text_key).fingerprint()["bytes"]
    else:
        path = Path(source)
        source, size = path.name + "/" * path.is_dir(), _bytes_of(path)
    a_step = job.train.global_batch * card.units_per_sample
    return Reading(source, card.unit, a_step, job.train.steps, size, *per_unit)


def _bytes_of(path: Path) -> int | None:
    """Bytes of a file, or of all files below a folder; None where there are none, more files than are counted, or some
    that cannot be looked at."""
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    try:
        few = [path] if path.is_file() else list(islice(files, FILES_COUNTED + 1))
        size = sum(file.stat().st_size for file in few if file.is_file())
    except OSError:
        return None
    return size if size and len(few) <= FILES_COUNTED else None


def groups_of_job(job: Job) -> MixedCluster:
    """The groups of different devices that the job names."""
    from meshwright.cluster import named_cluster
    from meshwright.plan.groups import MixedCluster

    with placed(job):
        named = [named_cluster(group.named, group.devices, group.devices_per_node) for group in job.cluster.groups]
        return MixedCluster(tuple(named))


def plan(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    framework: str = "meshwright",
    objective: str = "time",
    profile: str | Path | None = None,
) -> Plan:
    """The layout for a job, with what it will cost and why. Needs no data. Raises CannotWork where none fits.

    `framework` names the one that will run it, `objective` is "time" or "money", `profile` a file of constants.
    """
    from meshwright.plan import make_plan

    sound = read_job(job, overrides, data_must_exist=False)
    constants = None if profile is None else profile_of(profile)
    request, style = _request(sound, framework, objective), _style(framework, sound.train.precision)
    if sound.cluster.groups:
        from meshwright.plan.mixed import make_mixed_plan

        card, mixed = each(lambda: card_of_job(sound, style), lambda: groups_of_job(sound))
        return make_mixed_plan(card, mixed, request, constants)
    card, cluster = each(lambda: card_of_job(sound, style), lambda: cluster_of_job(sound))
    return make_plan(card, cluster, request, constants)


def _style(framework: str, precision: str) -> str:
    """How the framework's blocks compute, in words that a card knows."""
    if framework == "meshwright":
        return "plain"
    from meshwright.plan.framework import framework as row_of
    from meshwright.plan.setup import style_of

    return style_of(framework, precision, None) + ("+fused_loss" if row_of(framework).fused_cross_entropy else "")


def _request(job: Job, framework: str, objective: str) -> PlanRequest:
    from meshwright.plan import PlanRequest

    return PlanRequest(
        global_batch=job.train.global_batch,
        precision=job.train.precision,
        pins=job.layout.pins(),
        steps=job.train.steps,
        compile=job.train.compile,
        origins=job.origins,
        objective=objective,
        framework=framework,
        spot=job.cluster.spot,
        failures_per_1000_node_days=job.cluster.failures_per_1000_node_days,
        checkpoint_every=job.checkpoint.every,
        asynchronous=job.checkpoint.asynchronous,
    )


def profile_of(profile: str | Path | None = None, *, datasheet: bool = False) -> Profile:
    """The constants to predict with: a file's, the data sheets', or those that are shipped."""
    from meshwright.plan.profile import DATASHEET, default_profile, load_profile

    if datasheet and profile is not None:
        raise InputError(Problem("command line", "--datasheet uses nothing fitted", "leave out --profile"))
    if datasheet:
        return DATASHEET
    return default_profile() if profile is None else load_profile(Path(profile))


def predict(
    cases: str | Path, *, profile: str | Path | None = None, datasheet: bool = False
) -> Iterator[dict[str, Any]]:
    """An answer for each line of a file of cases, in order: {id, step_seconds, peak_allocated_gib, peak_reserved_gib,
    breakdown} or {id, error}. Raises InputError where the file or the profile cannot be read."""
    from meshwright.plan.case import read_cases
    from meshwright.plan.predict import predictions

    return predictions(read_cases(cases), profile_of(profile, datasheet=datasheet))


def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    profile: str | Path | None = None,
    datasheet: bool = False,
    seconds: float = MEASURED_SECONDS,
) -> dict[str, Any]:
    """Makes a profile and writes it to `out`: {"out", "from", ...}.

    `source` is a file of measured cases, which constants are fitted to ("rows", "moved", "mean_error", "intervals");
    a run folder, which corrects the plan behind it ("steps", "noise", "factors", "parts", "changed", "interval"); or
    "machine", which measures this machine for about `seconds` ("changed", "seconds", and under "busy" what other work
    on it kept from being measured). All start from the shipped profile, the one named, or the data sheets'. A profile
    that is at `out` is replaced. Raises InputError where the source cannot be used, and, before anything is measured or
    fitted, where `out` is anything else that is there.
    """
    machine = str(source) == "machine"
    if not machine and seconds != MEASURED_SECONDS:
        what = "--seconds is how long to measure the machine; nothing else reads it"
        raise InputError(Problem("command line", what, "leave out --seconds, or calibrate machine"))
    path, start = Path(out), profile_of(profile, datasheet=datasheet)
    target = _profile_target(path, None if machine else Path(source))
    if machine:
        found, made = _from_machine(path, start, seconds)
    elif Path(source).is_dir():
        found, made = _from_run(Path(source), path, start)
    else:
        found, made = _from_cases(source, path, start)
    note = ""
    if "raw" in made:  # the figures that the constants were read off
        note = "Measured (JSON): " + json.dumps(made["raw"], separators=(",", ":"))
    try:
        found.save(target, note)
    except OSError as error:
        raise InputError(Problem(str(path), f"cannot be written ({error.strerror})", "name another file")) from error
    return {"out": str(path), **made}


def _profile_target(path: Path, source: Path | None) -> Path:
    """The file that a profile for `path` is written to, links followed. Raises InputError where that would destroy what
    it is made from, or a file that is no profile."""
    from meshwright.plan.profile import load_profile

    target, hint = Path(os.path.realpath(path)), "name another file"
    if not target.parent.is_dir():
        raise InputError(Problem(str(path), "its folder is not there", "name a file in a folder that is"))
    if source is not None:
        origin = Path(os.path.realpath(source))
        if target == origin:
            raise InputError(Problem(str(path), "is what the profile is made from", hint))
        if origin.is_dir() and target.is_relative_to(origin):
            raise InputError(Problem(str(path), f"lies in the run folder {source}", f"{hint}, outside it"))
    if os.path.exists(target) and not target.is_file():
        raise InputError(Problem(str(path), "is there, and is no file", hint))
    if os.path.exists(target):
        try:
            load_profile(target)
        except InputError as error:
            what = f"is there, and is no profile ({error.problems[0].what})"
            raise InputError(Problem(str(path), what, f"{hint}, or move it away")) from error
    return target


def _from_cases(source: str | Path, path: Path, start: Profile) -> tuple[Profile, dict[str, Any]]:
    from meshwright.plan.calibrate import calibrate as fit
    from meshwright.plan.case import measured_cases
    from meshwright.plan.plausible import believable

    cases, bad = measured_cases(source)
    good, absurd = believable(cases, start, str(source))
    try:
        found = fit(good, start, name=path.stem, skipped=[*bad, *absurd])
    except InputError as error:
        raise InputError([replace(problem, where=str(source)) for problem in error.problems]) from error
    return found.profile, {"from": "cases", **found.as_dict()}


def _from_machine(path: Path, start: Profile, seconds: float) -> tuple[Profile, dict[str, Any]]:
    """The machine measured; "raw" holds the figures themselves, "busy" what other work did to them, in words."""
    from meshwright import probe
    from meshwright.cluster import cpu_cluster, this_machine
    from meshwright.plan.from_machine import changes, disturbances, machine_profile

    raw = probe.machine(seconds)
    cluster = cpu_cluster() if raw["kind"] == "cpu" else this_machine()
    found = machine_profile(raw, cluster, start, path.stem)
    changed, busy = [change.as_dict() for change in changes(start, found)], list(disturbances(raw))
    for words in busy:
        logger.warning(words)
    return found, {"from": "machine", "seconds": raw["seconds"], "busy": busy, "changed": changed, "raw": raw}


def _from_run(folder: Path, path: Path, start: Profile) -> tuple[Profile, dict[str, Any]]:
    from meshwright.families import read_config
    from meshwright.job import load_job
    from meshwright.plan import Plan
    from meshwright.plan.from_run import Ran, run_profile
    from meshwright.run import RunFolder

    run = RunFolder(folder)
    for file in (run.job, run.plan, run.events):
        if not file.is_file():
            what = f"is no run folder: it has no {file.name}"
            raise InputError(Problem(str(folder), what, "name the folder that `train` made, or a file of cases"))
    job = load_job(run.job, data_must_exist=False)
    chosen = Plan.from_dict(read_config(run.plan), str(run.plan)).chosen
    card, cluster = card_of_job(job), cluster_of_job(job)
    asked = (job.train.global_batch, chosen.layout, chosen.precision, chosen.compiled)
    ran = Ran(card, cluster, *asked, chosen.predicted.step_seconds.mid)
    found = run_profile(run, ran, start, path.stem)
    return found.profile, {"from": "run", **found.as_dict()}
