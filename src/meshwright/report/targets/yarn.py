"""YARN: a service of two components, the driver and the agents."""

from __future__ import annotations

import json
from typing import Any

from meshwright.report.targets.job import (
    ACCESS_FOLDER,
    JOB_FOLDER,
    RUN_VOLUME,
    Handout,
    ScheduledJob,
    missing_paths,
    whole_nodes,
)
from meshwright.report.targets.pods import AGENTS_FILE, DRIVER_CORES, DRIVER_MEMORY_BYTES, HUB_FILE
from meshwright.report.targets.scripts import agent_script, driver_script
from meshwright.report.targets.text import mebibytes

SERVICE = "Yarnfile"
#: The driver's container in YARN's registry; YARN puts in what the words in ${} stand for.
DRIVER_HOST = "driver-0.${SERVICE_NAME}.${USER}.${DOMAIN}"


def handout(job: ScheduledJob) -> Handout:
    """Yarnfile, and the files that it reads from HDFS; those with secrets are for their owner alone."""
    run = f"{RUN_VOLUME}/{job.short_name}"
    driver = driver_script(
        job,
        job_file=f"{JOB_FOLDER}/job.toml",
        run=run,
        address=f"0.0.0.0:{job.port}",
        access=f"{ACCESS_FOLDER}/{HUB_FILE}",
    )
    hub = f"driver-0:{job.port}"  # agents are told the whole name, which only YARN knows
    inputs = {
        "job.toml": job.job_toml,
        "driver.sh": driver,
        "agent.sh": agent_script(job, f"{ACCESS_FOLDER}/{AGENTS_FILE}", named_hub=True),
        AGENTS_FILE: job.access.for_agents(hub),
        HUB_FILE: job.access.for_hub(),
    }
    folder = f"meshwright/{job.short_name}"  # in the user's home on HDFS
    submit = (
        ("hdfs", "dfs", "-mkdir", "-p", folder),
        ("hdfs", "dfs", "-chmod", "700", folder),
        ("hdfs", "dfs", "-put", "-f", *inputs, folder),
        ("yarn", "app", "-launch", job.short_name, SERVICE),
    )
    service = json.dumps(_service(job, folder), indent=2) + "\n"
    private = frozenset({AGENTS_FILE, HUB_FILE})
    return Handout({SERVICE: service, **inputs}, tuple(_omitted(job)), submit, private)


def _service(job: ScheduledJob, folder: str) -> dict[str, Any]:
    queue = {"queue": job.queue} if job.queue else {}
    return {
        "name": job.short_name,
        "version": "1.0.0",
        "description": f"{job.name}: {job.summary}",
        **queue,
        "components": [_driver(job, folder), _agents(job, folder)],
    }


def _driver(job: ScheduledJob, folder: str) -> dict[str, Any]:
    mounts = {"YARN_CONTAINER_RUNTIME_DOCKER_MOUNTS": f"{RUN_VOLUME}:{RUN_VOLUME}:rw"}
    return {
        "name": "driver",
        "number_of_containers": 1,
        "artifact": {"id": job.image, "type": "DOCKER"},
        "launch_command": f"sh {JOB_FOLDER}/driver.sh",
        "restart_policy": "ON_FAILURE",
        "readiness_check": {"type": "PORT", "properties": {"port": str(job.port)}},
        "resource": {"cpus": DRIVER_CORES, "memory": str(mebibytes(DRIVER_MEMORY_BYTES))},
        "configuration": {"env": mounts, "files": _files(folder, ("job.toml", "driver.sh"), HUB_FILE)},
    }


def _agents(job: ScheduledJob, folder: str) -> dict[str, Any]:
    devices = {"additional": {"yarn.io/gpu": {"value": job.devices, "unit": ""}}} if job.resource else {}
    apart = {"type": "ANTI_AFFINITY", "scope": "NODE", "target_tags": ["agent"]}
    return {
        "name": "agent",
        "number_of_containers": job.nodes,
        "dependencies": ["driver"],
        "artifact": {"id": job.image, "type": "DOCKER"},
        "launch_command": f"sh {JOB_FOLDER}/agent.sh {DRIVER_HOST}:{job.port}",
        "restart_policy": "ON_FAILURE",
        "resource": {"cpus": job.cores, "memory": str(mebibytes(job.memory_bytes)), **devices},
        "placement_policy": {"constraints": [apart]},
        "configuration": {"files": _files(folder, ("agent.sh",), AGENTS_FILE)},
    }


def _files(folder: str, names: tuple[str, ...], secret: str) -> list[dict[str, str]]:
    places = [*((name, JOB_FOLDER) for name in names), (secret, ACCESS_FOLDER)]
    return [{"type": "STATIC", "src_file": f"{folder}/{name}", "dest_file": f"{at}/{name}"} for name, at in places]


def _omitted(job: ScheduledJob) -> list[str]:
    omitted = [
        "the image: push it to where the cluster pulls from (--image NAME)",
        *missing_paths(job, "into the image"),
        f"a volume for the run: {RUN_VOLUME} is mounted from the node of the driver, which the administrators must "
        "allow; a driver that YARN starts again finds its run if all nodes share that folder",
        "a start of all containers or none: YARN starts those that there is room for, and the job waits for the rest",
        "exit codes that no retry helps (2 and 3): YARN starts the driver again after these too",
        *whole_nodes(job),
    ]
    if job.resource:
        omitted.append(f"the kind of device: any yarn.io/gpu is asked for, not {job.device}")
    return omitted
