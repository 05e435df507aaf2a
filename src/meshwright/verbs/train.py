"""`train`: train a job into its run folder, from the start or from the newest checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import CannotWork, InputError, Problem, RunFailed
from meshwright.files import write_atomic
from meshwright.verbs.plan import plan
from meshwright.verbs.report import write_page
from meshwright.verbs.start import cluster_of_job, locate_problems, location_of, read_job

if TYPE_CHECKING:
    from meshwright.job import Job
    from meshwright.launch import LocalProcesses
    from meshwright.plan import Plan
    from meshwright.run import RunFolder

#: Sections that a resumed run may not change, because its checkpoints depend on them.
FIXED_SECTIONS = ("model", "data", "task")
#: Keys of these that name a place: what is there is compared, not where it is (data.build_manifest, train.same_model).
PLACES = ("model.hf", "model.module_folder", "data.source", "data.tokenizer")
#: Another key that it may not change: the order of the samples follows from it.
FIXED_KEYS = ("train.seed",)

#: Sections that decide the plan: where they have not changed, a resumed run keeps its plan.
PLANNED_SECTIONS = ("model", "data", "cluster", "layout")


def run_folder_of(job: str | Path, run: str | Path | None = None) -> RunFolder:
    """The folder `run`, or by default runs/NAME for the job file NAME.toml."""
    from meshwright.run import RunFolder

    return RunFolder(run if run is not None else Path("runs") / Path(job).stem)


def train(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    run: str | Path | None = None,
    resume: bool = False,
    profile: str | Path | None = None,
    watch: Callable[[RunFolder, Plan, LocalProcesses], None] | None = None,
) -> dict[str, Any]:
    """Trains a job into its run folder and writes its report. Returns {"run", "step", "loss", ..., "report"}.

    `profile` is a file that `calibrate` wrote, to plan with. `watch(folder, plan, processes)` is called once the
    processes run, and may follow them until they end. Raises InputError where the folder holds a run and `resume` is
    not set (or the reverse), and RunFailed with the command that resumes, also where the processes ended early.
    """
    from meshwright import data, families
    from meshwright.job import Job, job_to_toml

    if run is None and isinstance(job, Job):
        raise InputError(Problem("run", "a Job has no name for its run folder", 'give run="runs/name"'))
    folder = run_folder_of(job if not isinstance(job, Job) else "", run)
    resume_with = resume_command(job, overrides, run)
    job = read_job(job, overrides, further_check=plan)
    if job.cluster.named is not None:
        what = f"'{job.cluster.named}' can only be planned for: `train` runs on this machine"
        raise CannotWork(Problem(location_of(job, "cluster.named"), what, "leave it out to train on this machine"))
    if job.cluster.groups:
        what = "devices of several kinds can only be planned for: `train` runs on this machine"
        raise CannotWork(Problem(location_of(job, "cluster.groups"), what, "leave it out to train on this machine"))
    with locate_problems(job):
        families.require_trainable(job)
    earlier_job = _earlier_job(folder, resume, resume_with)
    if earlier_job is not None:
        _check_same_run(earlier_job, job, folder)
    chosen = _reusable_plan(folder, earlier_job, job) or plan(job, profile=profile)
    _create(folder)
    with folder.lock():
        if earlier_job is None:
            _earlier_job(folder, resume, resume_with)  # a run that began while this one was planned
        with locate_problems(job):
            data.build_manifest(job, folder.manifest)  # before job.toml, which marks a run that can be resumed
        with _written_unless_refused(folder, job_to_toml(job), chosen):
            results = _run(folder, chosen, job, resume, resume_with, watch)
    return {"run": str(folder.path), **results[0], "report": str(write_page(folder.path))}


def _run(
    folder: RunFolder,
    chosen: Plan,
    job: Job,
    resume: bool,
    resume_with: str,
    watch: Callable[[RunFolder, Plan, LocalProcesses], None] | None,
) -> list[Any]:
    """Trains in processes; returns their results. Raises RunFailed with the command that resumes."""
    from meshwright import launch
    from meshwright.env import trainer_status
    from meshwright.report.progress import StatusAddress, posted

    processes = launch.local(
        "meshwright.train:work",
        {"run": str(folder.path.resolve()), "resume": resume},
        chosen.chosen.layout.devices,
        folder.logs,
        interface=job.launch.interface,
        grace_seconds=60.0,  # time to save a checkpoint
        keep_memory=chosen.chosen.keeps_freed_memory,
    )
    try:
        told = trainer_status()
        with posted(folder, job.train.steps, None if told is None else StatusAddress(*told)):
            if watch is not None:
                watch(folder, chosen, processes)
            results = processes.wait()
        if results[0]["step"] < job.train.steps:  # each ended in order, after a signal from outside
            what = f"its processes were asked to end: saved at step {results[0]['step']} of {job.train.steps}"
            raise RunFailed(Problem(str(folder.path), what))
        return results
    except RunFailed as error:
        folder.append_event("failure", reason=str(error.problems[0]))
        raise RunFailed(error.problems, resume=resume_with) from error
    finally:
        processes.stop()


@contextmanager
def _written_unless_refused(folder: RunFolder, job: str, plan: Plan) -> Iterator[None]:
    """Writes job.toml and plan.json; puts back what was there if the processes refuse the job before they train."""
    before = {path: path.read_bytes() if path.exists() else None for path in (folder.job, folder.plan)}
    events = folder.tail(lambda: True, from_end=True)
    folder.write_job(job)
    folder.write_plan(plan.as_dict())
    try:
        yield
    except (InputError, CannotWork):
        if not any(event["event"] == "start" for event in events):
            for path, content in before.items():
                path.unlink() if content is None else write_atomic(path, content)
        raise


def resume_command(job: Job | str | Path, overrides: Sequence[str], run: str | Path | None) -> str:
    """The command that resumes a run."""
    name = str(job) if isinstance(job, str | Path) else f"{run}/job.toml"
    words = ["meshwright", "train", name, *overrides, *(["--run", str(run)] if run is not None else []), "--resume"]
    return shlex.join(words)


def _earlier_job(folder: RunFolder, resume: bool, resume_with: str) -> Job | None:
    """The job of the run to resume; None for a new run."""
    from meshwright.job import load_job

    if folder.job.exists() and not resume:
        hint = f"to resume it: {resume_with}; or name another folder with --run DIR"
        raise InputError(Problem(str(folder.path), "holds a run already", hint))
    if resume and not folder.job.exists():
        raise InputError(Problem(str(folder.path), "holds no run to resume", "leave --resume out to start one"))
    return load_job(folder.job, data_must_exist=False, model_must_exist=False) if resume else None


def _create(folder: RunFolder) -> None:
    try:
        folder.create()
    except OSError as error:
        what = f"cannot be a run folder ({error.strerror})"
        raise InputError(Problem(str(folder.path), what, "name another with --run DIR")) from error


def _check_same_run(earlier: Job, job: Job, folder: RunFolder) -> None:
    """Raises InputError where the job differs from the run's in FIXED_SECTIONS or FIXED_KEYS, but for PLACES."""
    before, now = earlier.as_dict(), job.as_dict()
    problems = [
        Problem(
            f"{section}.{key}",
            f"is {now[section][key]!r}, the run in {folder.path} was made with {value!r}",
            "name another folder with --run DIR",
        )
        for section, keys in before.items()
        for key, value in keys.items()
        if (section in FIXED_SECTIONS or f"{section}.{key}" in FIXED_KEYS)
        and now[section][key] != value
        and not (f"{section}.{key}" in PLACES and value is not None and now[section][key] is not None)
    ]
    if problems:
        raise InputError(problems)


def _reusable_plan(folder: RunFolder, earlier: Job | None, job: Job) -> Plan | None:
    """The plan of a resumed run, where nothing that decides it has changed; else None."""
    if earlier is None or not folder.plan.exists():
        return None
    before, now = earlier.as_dict(), job.as_dict()
    same = all(before[section] == now[section] for section in PLANNED_SECTIONS)
    same = same and all(before["train"][key] == now["train"][key] for key in ("global_batch", "precision", "compile"))
    if not same:
        return None
    from meshwright.plan import Plan

    earlier_plan = Plan.read(folder.plan)
    return earlier_plan if earlier_plan.chosen.layout.devices == cluster_of_job(job).devices else None
