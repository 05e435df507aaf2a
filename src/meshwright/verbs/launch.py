"""`launch`: a planned job handed to a scheduler, in its own words."""

from __future__ import annotations

import math
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import CannotWork, InputError, Problem, RunFailed, nearest_name
from meshwright.verbs.plan import plan
from meshwright.verbs.start import cluster_of_job, gather, locate_problems, location_of, read_job
from meshwright.verbs.train import run_folder_of

if TYPE_CHECKING:
    from meshwright.cluster import Cluster
    from meshwright.job import Job
    from meshwright.plan import Plan
    from meshwright.report.targets import Access, Handout, ScheduledJob

GIB = 1 << 30
#: The hub's port where agents are told one.
HUB_PORT = 7474
#: What a process takes of the host beside its tensors, and the driver with its agent of the first node.
PROCESS_BYTES, DRIVER_BYTES = 4 * GIB, 1 * GIB
#: For each GPU: its process, the threads that load its data and write its checkpoint.
CORES_PER_GPU = 4
#: A checkpoint in fp32: weights and two moments, and the model's folder beside them.
CHECKPOINT_BYTES_PER_PARAMETER = 16
#: The least time to save in, and how much longer than predicted it may take.
GRACE_SECONDS, GRACE_FACTOR = 60, 2.0
#: Requests that a server is given at once where the job does not say.
SERVE_AT_ONCE = 8
#: Begin of a generation of devices -> Kubernetes' name of the device; no other is one that torch runs on here.
RESOURCES = {"sm": "nvidia.com/gpu", "cdna": "amd.com/gpu"}
RECORD = "launched.json"
SUBMIT_SECONDS = 300


def launch(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    on: str,
    write: str | Path | None = None,
    submit: bool = False,
    run: str | Path | None = None,
    image: str | None = None,
    queue: str | None = None,
    profile: str | Path | None = None,
) -> dict[str, Any]:
    """Plans a job and writes what the scheduler `on` needs to run it: {"target", "folder", "files", "private",
    "omitted", "commands", "answer"}.

    `files` has the text of each by name, without those in `private`, which hold the job's secrets. They are written
    into `write`, by default nowhere; `submit` writes them, there or into RUN/launch, and runs the `commands`, whose
    output is `answer`. `omitted` says in sentences what the scheduler cannot be told. Raises InputError for an unknown
    scheduler and where its program is missing, CannotWork where the job does not fit or cannot run there, RunFailed
    where the scheduler refuses it.
    """
    from meshwright.job import Job
    from meshwright.report.targets import TARGETS
    from meshwright.report.written import write_files

    if on not in TARGETS:
        raise InputError(Problem("command line: --on", f"no scheduler '{on}'", nearest_name(on, list(TARGETS))))
    if run is None and isinstance(job, Job):
        raise InputError(Problem("run", "a Job has no name for its run folder", 'give run="runs/name"'))
    folder = run_folder_of(job if not isinstance(job, Job) else "", run).path.resolve()
    for where, text in (("--queue", queue), ("--image", image), ("--run", str(folder))):
        if text is not None and not text.isprintable():  # it would begin a line of its own in a script
            raise InputError(Problem(f"command line: {where}", f"{text!a} has a control character", "leave it out"))
    if submit and write is None:
        write = folder / "launch"
    written = Path.cwd() if write is None else Path(write).resolve()
    name = folder.name if isinstance(job, Job) else Path(job).stem
    valid_job = read_job(job, overrides, data_must_exist=False, further_check=plan)
    _require_trainable(valid_job)
    planned, cluster = gather(lambda: plan(valid_job, profile=profile), lambda: cluster_of_job(valid_job))
    values = scheduled(valid_job, planned, cluster, name=name, run=folder, folder=written, image=image, queue=queue)
    handout = TARGETS[on](values)
    if submit:
        _require_programs(handout, written)
    if write is not None:
        write_files(handout.files, write, record=RECORD, writer="launch", private=handout.private)
    answer = "".join(_submitted(command, written) for command in handout.submit) if submit else None
    return {
        "target": on,
        "folder": None if write is None else str(written),
        "files": {name: text for name, text in handout.files.items() if name not in handout.private},
        "private": sorted(handout.private),
        "omitted": list(handout.omitted),
        "commands": [shlex.join(command) for command in handout.submit],
        "answer": answer,
    }


def scheduled(
    job: Job,
    planned: Plan,
    cluster: Cluster,
    *,
    name: str,
    run: Path,
    folder: Path,
    image: str | None = None,
    queue: str | None = None,
    access: Access | None = None,
) -> ScheduledJob:
    """What a scheduler has to know of a planned job. `access` is made anew where none is given."""
    from meshwright import __version__
    from meshwright.report.targets import ScheduledJob

    layout, serve = planned.chosen.layout, job.serve
    devices = min(cluster.devices_per_node, layout.devices)
    nodes = -(-layout.devices // devices)
    least = job.launch.devices_min
    on_gpu = cluster.device.kind != "cpu"
    host_cores = max(1, cluster.device.units) * cluster.devices_per_node
    return ScheduledJob(
        name=name,
        summary=f"{planned.model} as {layout} on {planned.cluster}",
        job_toml=_job_text(job, layout.devices, devices),
        run=str(run),
        folder=str(folder),
        python=sys.executable,
        nodes=nodes,
        nodes_min=nodes if least is None else min(nodes, max(1, -(-least // devices))),
        devices=devices,
        device=cluster.device.name,
        resource=_resource(job, cluster),
        cores=CORES_PER_GPU * devices if on_gpu else host_cores,
        memory_bytes=_memory_bytes(planned, devices, on_gpu),
        checkpoint_bytes=CHECKPOINT_BYTES_PER_PARAMETER * planned.parameters,
        checkpoints_kept=job.checkpoint.keep,
        grace_seconds=_grace_seconds(planned),
        port=HUB_PORT,
        image=image or f"meshwright:{__version__}",
        version=__version__,
        access=access or new_access(),
        serve_devices=serve.tp or 1,
        serve_at_once=serve.max_batch or SERVE_AT_ONCE,
        spot=job.cluster.spot,
        queue=queue,
        paths=_paths(job),
    )


def new_access() -> Access:
    """Secrets that no other job has, and a certificate of the job's hub."""
    from meshwright.launch.access import new_access as of_hub
    from meshwright.report.targets import Access

    hub = of_hub(network=True)
    return Access(hub.join, hub.read, hub.act, hub.certificate, hub.key, token=secrets.token_hex(32))


def _require_trainable(job: Job) -> None:
    from meshwright import families

    with locate_problems(job):
        families.require_trainable(job)


def _given(job: Job, key: str) -> bool:
    """Whether the job says this, and not our defaults."""
    return job.origins.get(key, "default") != "default"


def _job_text(job: Job, devices: int, devices_per_node: int) -> str:
    """The job file for over there: what this job says, on as many devices as were planned for, but for the way of its
    launch, which its command there says."""
    from meshwright.files import toml_text

    left_out = ("launch.on", "launch.address")
    sections = {
        section: {key: value for key, value in keys.items() if _given(job, f"{section}.{key}")}
        for section, keys in job.as_dict().items()
    }
    sections["cluster"] |= {"devices": devices, "devices_per_node": devices_per_node}
    for key in left_out:
        section, _, name = key.partition(".")
        sections[section].pop(name, None)
    return toml_text(sections)


def _resource(job: Job, cluster: Cluster) -> str:
    """Kubernetes' name of the device, "" for CPU cores. Raises CannotWork for devices that are only planned for."""
    device = cluster.device
    if device.kind == "cpu":
        return ""
    for begin, name in RESOURCES.items():
        if device.generation.startswith(begin):
            return name
    what = f"'{device.name}' can only be planned for: Meshwright runs on CPU cores and on GPUs of NVIDIA and AMD"
    raise CannotWork(Problem(location_of(job, "cluster.named"), what, "nearest: cluster.named=h100-sxm-80gb"))


def _memory_bytes(planned: Plan, devices: int, on_gpu: bool) -> int:
    """The host's memory of a node: on CPU cores the upper bound of the predicted peak of each process, on GPUs the copy
    of the state from which checkpoints are written; and what driver and agent take."""
    predicted = planned.chosen.predicted
    if on_gpu:
        state = max((stage.weights + stage.optimizer for stage in planned.chosen.memory), default=predicted.peak_bytes)
        return DRIVER_BYTES + devices * (state + PROCESS_BYTES)
    highest = predicted.intervals.get("peak_bytes", (0.0, float(predicted.peak_bytes)))[1]
    return DRIVER_BYTES + devices * math.ceil(max(highest, predicted.peak_bytes))


def _grace_seconds(planned: Plan) -> int:
    """How long a job that is asked to end needs to save."""
    step = planned.chosen.predicted.step_seconds.high
    durable = planned.outlook.durable_seconds if planned.outlook is not None else 0.0
    return max(GRACE_SECONDS, math.ceil(GRACE_FACTOR * (step + durable)))


def _paths(job: Job) -> tuple[str, ...]:
    """Files and folders of this machine that the job reads."""
    values: Mapping[str, Any] = {
        "data.source": job.data.source,
        "data.tokenizer": job.data.tokenizer,
        "model.hf": job.model.hf,
        "model.module_folder": job.model.module_folder,
    }
    return tuple(str(value) for value in values.values() if value is not None and Path(str(value)).is_absolute())


def _require_programs(handout: Handout, folder: Path) -> None:
    """Raises InputError, before anything is submitted, for programs that are not here."""
    commands = "; ".join(shlex.join(command) for command in handout.submit)
    missing = dict.fromkeys(command[0] for command in handout.submit if shutil.which(command[0]) is None)
    if missing:
        near = f"leave out --submit, and where there is one: cd {shlex.quote(str(folder))}; {commands}"
        raise InputError([Problem("command line: --submit", f"no program '{name}' is here", near) for name in missing])


def _submitted(command: Sequence[str], folder: Path) -> str:
    """The output of a command that submits. Raises RunFailed with what it says where it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SUBMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        what = f"has not answered in {SUBMIT_SECONDS} s"
        raise RunFailed(Problem(shlex.join(command), what, "see whether the scheduler runs")) from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it says nothing")[-2000:]
        raise RunFailed(Problem(shlex.join(command), f"ended with {done.returncode}: {said}"))
    return done.stdout
