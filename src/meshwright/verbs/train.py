"""`train`: train a job into its run folder, from the start or from the newest checkpoint."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.env import detached, trainer_status
from meshwright.errors import CannotWork, InputError, Problem, RunFailed
from meshwright.files import write_atomic
from meshwright.verbs.plan import plan
from meshwright.verbs.report import write_page
from meshwright.verbs.start import cluster_of_job, locate_problems, location_of, read_job
from meshwright.verbs.training_groups import OneStart, TrainingGroups, cluster_of_share

if TYPE_CHECKING:
    from meshwright.job import Job
    from meshwright.launch import ClusterBackend, Launch, RankGroup
    from meshwright.launch.messages import Message
    from meshwright.plan import Plan
    from meshwright.run import RunFolder

logger = logging.getLogger("meshwright")

#: Sections that a resumed run may not change, because its checkpoints depend on them.
FIXED_SECTIONS = ("model", "data", "task")
#: Keys of these that name a place: what is there is compared, not where it is (data.build_manifest, train.same_model).
PLACES = ("model.hf", "model.module_folder", "data.source", "data.tokenizer")
#: Another key that it may not change: the order of the samples follows from it.
FIXED_KEYS = ("train.seed",)

WITHOUT_DISK = (
    "does not see the run folder's disk: its ranks copy job, data and checkpoint from the driver, and save through it"
)
#: How long the ranks of a detached run go on without their driver, which may be started again meanwhile.
DETACHED_PATIENCE_SECONDS = 600.0
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
    watch: Callable[[RunFolder, Plan, Launch], None] | None = None,
) -> dict[str, Any]:
    """Trains a job into its run folder and writes its report. Returns {"run", "step", "loss", ..., "report"}.

    `profile` is a file that `calibrate` wrote, to plan with. `watch(folder, plan, processes)` is called once the
    processes run, and may follow them until they end. Raises InputError where the folder holds a run and `resume` is
    not set (or the reverse), and RunFailed with the command that resumes, also where the processes ended early.
    """
    from meshwright import data, families, storage
    from meshwright.job import Job, job_to_toml

    if run is None and isinstance(job, Job):
        raise InputError(Problem("run", "a Job has no name for its run folder", 'give run="runs/name"'))
    folder = run_folder_of(job if not isinstance(job, Job) else "", run)
    resume_with = resume_command(job, overrides, run)
    job = read_job(job, overrides, further_check=plan)
    on_this_machine = job.launch.on == "local"
    if job.cluster.named is not None and on_this_machine:
        what = f"'{job.cluster.named}' can only be planned for: `train` runs on this machine"
        raise CannotWork(Problem(location_of(job, "cluster.named"), what, "leave it out to train on this machine"))
    if job.cluster.groups:
        what = "devices of several kinds can only be planned for: `train` runs on equal ones"
        raise CannotWork(Problem(location_of(job, "cluster.groups"), what, "leave it out to train on this machine"))
    with locate_problems(job):
        families.require_trainable(job)
        backend = backend_of_job(job)
    if job.checkpoint.url is not None:
        _bring_back(folder, job.checkpoint.url) if resume else storage.RunCopy(job.checkpoint.url).require_none()
    earlier_job = _earlier_job(folder, resume, resume_with)
    if earlier_job is not None:
        _check_same_run(earlier_job, job, folder)
    groups: OneStart | TrainingGroups
    if on_this_machine:
        chosen = _reusable_plan(folder, earlier_job, job) or plan(job, profile=profile)
        groups = OneStart(folder, chosen, cluster_of_job(job).device.kind, resume=resume)
    else:
        groups = TrainingGroups(
            job,
            folder,
            lambda share: plan(job, profile=profile, cluster=cluster_of_share(job, share)),
            resume=resume,
            may_grow=job.launch.on == "agents",
        )
    _create(folder)
    with folder.lock():
        if earlier_job is None:
            _earlier_job(folder, resume, resume_with)  # a run that began while this one was planned
        with locate_problems(job):
            data.build_manifest(job, folder.manifest)  # before job.toml, which marks a run that can be resumed
        kept = _kept_in_store(folder, job, resume_with, new=earlier_job is None)
        with _written_unless_refused(folder, job_to_toml(job)), locate_problems(job), kept:
            results = _run(folder, groups, backend, job, resume_with, watch)
    return {"run": str(folder.path), **results[0], "report": str(write_page(folder.path))}


def _bring_back(folder: RunFolder, url: str) -> None:
    """Fetches from the store what a resume needs and the folder lacks; job.toml last, which marks a run."""
    from meshwright import storage
    from meshwright.job import sections_to_toml

    if not folder.job.exists() and not storage.RunCopy(url).checkpoints():
        what = f"holds no committed checkpoint, and {folder.path} no run to resume"
        raise InputError(Problem(url, what, "leave --resume out to start one"))
    _create(folder)
    with folder.lock():
        meta = storage.bring_back(url, folder)
        if meta is not None and not folder.job.exists():
            folder.write_job(sections_to_toml(meta["job"]))


@contextmanager
def _kept_in_store(folder: RunFolder, job: Job, resume_with: str, *, new: bool) -> Iterator[None]:
    """`storage.kept_in_store` as the job says; its RunFailed has the command that resumes."""
    from meshwright import storage

    try:
        with storage.kept_in_store(job.checkpoint.url, folder, job.checkpoint.keep, new=new):
            yield
    except RunFailed as error:
        raise RunFailed(error.problems, resume=resume_with) from error


def backend_of_job(job: Job) -> ClusterBackend:
    """Where the ranks of the job run."""
    from meshwright.launch import LocalBackend
    from meshwright.launch.backends import remote_backend

    section = job.launch
    if section.on != "local":
        interface = None if section.interface == "lo" else section.interface
        return remote_backend(section.on, section.address, interface, job.cluster.devices)
    cluster = cluster_of_job(job)
    return LocalBackend(cluster.devices, kind=cluster.device.kind, interface=section.interface)


def _run(
    folder: RunFolder,
    groups: OneStart | TrainingGroups,
    backend: ClusterBackend,
    job: Job,
    resume_with: str,
    watch: Callable[[RunFolder, Plan, Launch], None] | None,
) -> list[Any]:
    """Trains in processes; returns their results. Raises RunFailed with the command that resumes."""
    from meshwright import launch
    from meshwright.report.progress import StatusAddress, posted

    traces: dict[int, list[dict[str, Any]]] = {}

    def begin(_: Sequence[RankGroup]) -> int:
        assert groups.planned is not None
        traces.clear()
        folder.write_plan(groups.planned.as_dict())
        groups.begin()
        return folder.grant_lease()

    processes: Launch | None = None
    try:
        processes = launch.keep(
            backend,
            groups,
            folder.logs,
            hub_folder=folder.hub,
            grace_seconds=60.0,  # time to save a checkpoint
            start_seconds=job.launch.timeout_seconds,
            on_message=partial(_take, folder, groups, traces),
            on_start=begin,
            on_adopt=groups.adopt,
            patience_seconds=DETACHED_PATIENCE_SECONDS if detached() else 0.0,
        )
        told = trainer_status()
        address = None if told is None else StatusAddress(*told)
        with processes, posted(folder, job.train.steps, address):
            assert groups.planned is not None
            if watch is not None:
                watch(folder, groups.planned, processes)
            results = processes.wait()
        folder.write_trace(traces)
    except RunFailed as error:
        if processes is not None and processes.poll() == "stopped":
            what = "was stopped before it had saved" if folder.steps() else "was stopped before its first step"
            raise RunFailed(Problem(str(folder.path), what), resume=resume_with) from error
        with suppress(OSError):  # as where a full disk is the failure
            folder.append_event("failure", reason=str(error.problems[0]))
        raise RunFailed(error.problems, resume=resume_with) from error
    if results[0]["step"] < job.train.steps:  # each ended in order: after `stop`, or a signal from outside
        what = f"its processes were asked to end: saved at step {results[0]['step']} of {job.train.steps}"
        raise RunFailed(Problem(str(folder.path), what), resume=resume_with)
    return results


def _take(
    folder: RunFolder, groups: OneStart | TrainingGroups, traces: dict[int, list[dict[str, Any]]], message: Message
) -> None:
    """Writes down what a rank tells: an event, its trace, or that its node does not see the run folder."""
    if message.kind == "trace":
        traces[message.rank] = json.loads(message.blob)
        return
    if message.kind == "without-disk":
        logger.warning("node %s %s", message.body["node"], WITHOUT_DISK)
        groups.holds(message.body["node"], 0)
        folder.append_event("without-disk", node=message.body["node"], reason=WITHOUT_DISK)
        return
    kind = message.body.pop("kind")
    if kind == "copied":
        groups.holds(message.body["node"], message.body["bytes"])
    try:
        folder.append_event(kind, **message.body)
    except OSError as error:
        raise RunFailed(Problem(str(folder.events), f"cannot be written: {error.strerror}")) from error


@contextmanager
def _written_unless_refused(folder: RunFolder, job: str) -> Iterator[None]:
    """Writes job.toml; puts it and plan.json back as they were if the processes refuse the job before they train."""
    before = {path: path.read_bytes() if path.exists() else None for path in (folder.job, folder.plan)}
    events = folder.tail(lambda: True, from_end=True)
    folder.write_job(job)
    try:
        yield
    except (InputError, CannotWork):
        if not any(event["event"] == "start" for event in events):
            for path, content in before.items():
                path.unlink(missing_ok=True) if content is None else write_atomic(path, content)
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
