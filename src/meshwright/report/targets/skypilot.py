"""SkyPilot: a managed job, on spot machines where the job says so, that is started again elsewhere when they go."""

from __future__ import annotations

import hashlib
from typing import Any

from meshwright.report.targets.job import Handout, ScheduledJob, missing_paths, whole_nodes
from meshwright.report.targets.pods import AGENTS_FILE, HUB_FILE
from meshwright.report.targets.scripts import agent_script, driver_script
from meshwright.report.targets.text import mebibytes, not_said, yaml_text

TASK = "task.yaml"
#: Where the bucket with the run is mounted.
BUCKET_FOLDER = "/meshwright-run"
#: Device of our table -> SkyPilot's name of it.
ACCELERATORS = {
    "a100-sxm-40gb": "A100",
    "a100-sxm-80gb": "A100-80GB",
    "a100-pcie-80gb": "A100-80GB",
    "h100-sxm-80gb": "H100",
    "h100-pcie-80gb": "H100",
    "h200-sxm": "H200",
    "b200-sxm": "B200",
    "b300-sxm": "B300",
    "gb200": "GB200",
    "gb300": "GB300",
    "mi300x": "MI300X",
    "l4": "L4",
    "l40s": "L40S",
    "t4": "T4",
    "v100-sxm-32gb": "V100-32GB",
    "rtx-4090": "RTX4090",
    "rtx-pro-6000": "RTXPRO6000",
}
#: A job that fails of itself is started again this often, and resumes; when its machines go, always.
RETRIES = 6
#: What every node runs: the first the driver as well, whose address the others are told.
RUN = """\
set -u
head=$(printf '%s\\n' "$SKYPILOT_NODE_IPS" | head -n 1)
driver=
if [ "$SKYPILOT_NODE_RANK" = 0 ]; then
  sh driver.sh &
  driver=$!
fi
sh agent.sh "$head:PORT" &
agent=$!
trap 'kill -TERM "$agent" ${driver:+"$driver"}' TERM INT
code=0
if [ -n "$driver" ]; then
  wait "$driver" || code=$?
  if [ "$code" -ne 0 ]; then kill -TERM "$agent"; fi
fi
wait "$agent" || [ "$code" -ne 0 ] || code=$?
exit "$code"
"""


def handout(job: ScheduledJob) -> Handout:
    """task.yaml, and the files that SkyPilot copies to each node; those with secrets are for their owner alone."""
    omitted = _omitted(job)
    about = [f"{job.name}: {job.summary}", *not_said(omitted)]
    hub = f"127.0.0.1:{job.port}"  # agents are told the first node's address, which only SkyPilot knows
    run = f"{BUCKET_FOLDER}/{job.short_name}"
    files = {
        TASK: yaml_text([(about, _task(job))]),
        "job.toml": job.job_toml,
        "driver.sh": driver_script(job, job_file="job.toml", run=run, address=f"0.0.0.0:{job.port}", access=HUB_FILE),
        "agent.sh": agent_script(job, AGENTS_FILE, named_hub=True),
        AGENTS_FILE: job.access.for_agents(hub),
        HUB_FILE: job.access.for_hub(),
    }
    submit = (("sky", "jobs", "launch", "--yes", "--name", job.short_name, TASK),)
    return Handout(files, tuple(omitted), submit, frozenset({AGENTS_FILE, HUB_FILE}))


def _task(job: ScheduledJob) -> dict[str, Any]:
    accelerator = {"accelerators": {_accelerator(job): job.devices}} if job.resource else {}
    resources = {
        **accelerator,
        "cpus": f"{job.cores}+",
        "memory": f"{-(-mebibytes(job.memory_bytes) // 1024)}+",  # GiB
        "image_id": f"docker:{job.image}",
        "use_spot": job.spot,
        "job_recovery": {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": RETRIES},
    }
    digest = hashlib.sha256(job.run.encode()).hexdigest()[:8]
    return {
        "name": job.short_name,
        "num_nodes": job.nodes,
        "resources": resources,
        "workdir": ".",
        "file_mounts": {BUCKET_FOLDER: {"name": f"{job.short_name}-{digest}", "mode": "MOUNT_CACHED"}},
        "run": RUN.replace("PORT", str(job.port)),
    }


def _accelerator(job: ScheduledJob) -> str:
    return ACCELERATORS.get(job.device, job.device)


def _omitted(job: ScheduledJob) -> list[str]:
    omitted = [
        "the image: push it to where the machines can pull it (--image NAME)",
        *missing_paths(job, "into the image"),
        "a disk for the run: it is a bucket that is written behind a cache, so a machine that is taken away may lose "
        "the checkpoint that it wrote last, and the run goes on from the one before",
        "the modes of files in the bucket: RUN/hub holds the hub's secrets, and the driver refuses them where the "
        "mount shows them as open to others",
        "a warning before a machine is taken away: the run goes on from its newest checkpoint in the bucket",
        *whole_nodes(job),
    ]
    if job.resource and job.device not in ACCELERATORS:
        omitted.append(f"SkyPilot's name of {job.device}: see `sky gpus list`")
    if job.queue:
        omitted.append(f"the queue {job.queue}: SkyPilot has pools instead (`sky jobs pool`)")
    return omitted
