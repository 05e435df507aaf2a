"""Slurm: a batch script that starts an agent on each node, runs the driver on the first, and requeues itself."""

from __future__ import annotations

import shlex
from pathlib import Path

import jinja2

from meshwright.report.targets.job import Handout, ScheduledJob
from meshwright.report.targets.text import comments, mebibytes, not_said, shell_words

SCRIPT = "job.sbatch"
TEMPLATE = "slurm.sh.jinja"


def handout(job: ScheduledJob) -> Handout:
    """job.sbatch and job.toml. The run folder, the job file and Meshwright must lie on a disk that the nodes share."""
    omitted = _omitted(job)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["word"] = shlex.quote
    about = [
        f"{job.name}: {job.summary}",
        f"submit: sbatch {SCRIPT}; it saves, requeues itself and resumes when Slurm takes its nodes or its time ends",
        *not_said(omitted),
    ]
    # Port 0: jobs that share a node would meet on any other, and agents read the port from the run folder.
    driver = job.driver(job_file=f"{job.folder}/job.toml", run=job.run, address="0.0.0.0:0")
    script = environment.get_template(TEMPLATE).render(
        options=_options(job),
        about=comments(about).rstrip("\n"),
        python=job.python,
        run=job.run,
        cores=job.cores,
        keep_going="--no-kill " if job.nodes_min < job.nodes else "",
        driver=shell_words(driver),
        agent=shell_words(job.agent()),
        grace=job.grace_seconds,
    )
    files = {SCRIPT: script, "job.toml": job.job_toml}
    return Handout(files, tuple(omitted), (("sbatch", SCRIPT),))


def _options(job: ScheduledJob) -> list[str]:
    elastic = job.nodes_min < job.nodes
    return [
        f"--job-name={job.short_name}",
        f"--nodes={job.nodes_min}-{job.nodes}" if elastic else f"--nodes={job.nodes}",
        # With a range and a number of tasks, Slurm gives the fewest nodes, however many are free.
        *([] if elastic else ["--ntasks-per-node=1"]),
        f"--cpus-per-task={job.cores}",
        f"--mem={mebibytes(job.memory_bytes)}M",
        *([f"--gres=gpu:{job.devices}"] if job.resource else []),
        *([f"--partition={_quoted(job.queue)}"] if job.queue else []),
        f"--output={_quoted(job.folder.replace('%', '%%') + '/slurm-%j.log')}",
        "--open-mode=append",
        "--requeue",
        *(["--no-kill"] if elastic else []),
        f"--signal=B:USR1@{job.grace_seconds}",
    ]


def _quoted(text: str) -> str:
    """A value of an #SBATCH line, whose quotes and backslashes sbatch reads as a shell does."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _omitted(job: ScheduledJob) -> list[str]:
    omitted = [
        "a limit of time: the partition's counts, and the script saves and requeues itself before it ends",
        "the container image: the nodes run the Python that Meshwright is installed for here",
    ]
    if job.resource:
        omitted.append(
            f"the kind of device: any GPU is asked for, not {job.device}; write --gres=gpu:TYPE:COUNT for it"
        )
    if job.nodes > 1:
        omitted.append("how near the nodes lie: add --switches=1 where the network is a tree")
    if job.nodes_min < job.nodes:
        omitted.append("new nodes in place of lost ones: the job goes on with the rest until it is requeued")
    return omitted
