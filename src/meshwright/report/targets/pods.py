"""What the kinds of Kubernetes share: the pods of driver and agents, their files, secrets, address and volume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.report.targets.job import ACCESS_FOLDER, JOB_FOLDER, RUN_VOLUME, ScheduledJob
from meshwright.report.targets.scripts import agent_script, driver_script, serve_script
from meshwright.report.targets.text import mebibytes

#: The driver plans, listens and writes the run folder; it holds no tensor.
DRIVER_CORES = 2
DRIVER_MEMORY_BYTES = 4 << 30
USER = 1000
DRIVER, AGENT, SERVER = "driver", "agent", "server"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
#: Keys of the Secret.
AGENTS_FILE, HUB_FILE, TOKEN_FILE = "agents.json", "access.json", "token"

Object = dict[str, Any]


def metadata(job: ScheduledJob, suffix: str = "", *, queued: bool = False) -> Object:
    """Name and labels of an object; the job's own name, whatever its characters, in an annotation."""
    labels = {**labels_of(job), **({QUEUE_LABEL: job.queue} if queued and job.queue else {})}
    return {"name": f"{job.short_name}{suffix}", "labels": labels, "annotations": {"meshwright/name": job.name}}


def labels_of(job: ScheduledJob, role: str | None = None) -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "meshwright", "app.kubernetes.io/instance": job.short_name}
    return {**labels, **({"app.kubernetes.io/component": role} if role else {})}


def run_of(job: ScheduledJob) -> str:
    """The run folder, on the volume of the driver."""
    return f"{RUN_VOLUME}/{job.short_name}"


def hub_address(job: ScheduledJob) -> str:
    """HOST:PORT by which agents find the driver."""
    return f"{job.short_name}-hub:{job.port}"


def config_map(job: ScheduledJob) -> Object:
    """The job file, and the scripts that start driver, agents and server."""
    driver = {"job_file": f"{JOB_FOLDER}/job.toml", "run": run_of(job)}
    files = {
        "job.toml": job.job_toml,
        "driver.sh": driver_script(job, **driver, address=f"0.0.0.0:{job.port}", access=f"{ACCESS_FOLDER}/{HUB_FILE}"),
        "ray-driver.sh": driver_script(job, **driver, address=None),
        "agent.sh": agent_script(job, f"{ACCESS_FOLDER}/{AGENTS_FILE}"),
        "serve.sh": serve_script(run_of(job), f"{ACCESS_FOLDER}/{TOKEN_FILE}"),
    }
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(job, "-job"), "data": files}


def secret(job: ScheduledJob) -> Object:
    """What agents, the driver and clients of the model server have to know, each as a file."""
    address = hub_address(job)
    files = {
        AGENTS_FILE: job.access.for_agents(address),
        HUB_FILE: job.access.for_hub(),
        TOKEN_FILE: job.access.token,
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(job, "-access"),
        "type": "Opaque",
        "stringData": files,
    }


def hub_service(job: ScheduledJob) -> Object:
    """The name by which agents find the driver, wherever its pod is."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": labels_of(job, DRIVER),
        "ports": [{"name": "hub", "port": job.port, "protocol": "TCP"}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata(job, "-hub"), "spec": spec}


def run_claim(job: ScheduledJob) -> Object:
    """The volume of the run folder. One node mounts it at a time: agents send their shards to the driver."""
    spec = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": f"{mebibytes(job.storage_bytes)}Mi"}},
    }
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata(job, "-run"), "spec": spec}


def driver_pod(job: ScheduledJob, *, container: str = DRIVER) -> Object:
    """The template of the driver's pod: it listens for agents and keeps the run folder."""
    limits = {"cpu": str(DRIVER_CORES), "memory": f"{mebibytes(DRIVER_MEMORY_BYTES)}Mi"}
    mounts = [job_files(job), secret_files(job, HUB_FILE), run_volume(job)]
    return pod(job, DRIVER, container, "driver.sh", limits, mounts, ports={"hub": job.port})


def agent_pod(job: ScheduledJob) -> Object:
    """The template of a node's pod: an agent that starts the ranks of that node."""
    mounts = [job_files(job), secret_files(job, AGENTS_FILE), shared_memory()]
    return pod(job, AGENT, AGENT, "agent.sh", node_limits(job), mounts)


def node_limits(job: ScheduledJob) -> dict[str, str]:
    """Cores, memory and devices of one node."""
    limits = {"cpu": str(job.cores), "memory": f"{mebibytes(job.memory_bytes)}Mi"}
    return {**limits, **({job.resource: str(job.devices)} if job.resource else {})}


def pod(
    job: ScheduledJob,
    role: str,
    container: str,
    script: str | None,
    limits: Mapping[str, str],
    mounts: Sequence[tuple[Object, Object]],
    *,
    ports: Mapping[str, int] | None = None,
    restart: str | None = "Never",
) -> Object:
    """A pod of one container that runs a script of the ConfigMap; `mounts` are pairs of a volume and its mount."""
    spec: Object = {
        "name": container,
        "image": job.image,
        **({"command": ["sh", f"{JOB_FOLDER}/{script}"]} if script else {}),
        **({"ports": [{"name": name, "containerPort": port} for name, port in ports.items()]} if ports else {}),
        "resources": {"requests": dict(limits), "limits": dict(limits)},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [mount for _, mount in mounts],
    }
    whole = {
        **({"restartPolicy": restart} if restart else {}),
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": job.grace_seconds,
        # Volumes and secrets belong to this group; files of a run that are its already keep their modes.
        "securityContext": {"fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"},
        "containers": [spec],
        "volumes": [volume for volume, _ in mounts],
    }
    return {"metadata": {"labels": labels_of(job, role)}, "spec": whole}


def job_files(job: ScheduledJob) -> tuple[Object, Object]:
    """The files of the ConfigMap."""
    return _volume("job", JOB_FOLDER, read_only=True, configMap={"name": f"{job.short_name}-job"})


def secret_files(job: ScheduledJob, *names: str) -> tuple[Object, Object]:
    """Those files of the Secret that a container needs."""
    items = [{"key": name, "path": name} for name in names]
    source = {"secretName": f"{job.short_name}-access", "defaultMode": 0o440, "items": items}
    return _volume("access", ACCESS_FOLDER, read_only=True, secret=source)


def run_volume(job: ScheduledJob, *, read_only: bool = False) -> tuple[Object, Object]:
    """The volume of the run folder."""
    claim = {"claimName": f"{job.short_name}-run", **({"readOnly": True} if read_only else {})}
    return _volume("run", RUN_VOLUME, read_only=read_only, persistentVolumeClaim=claim)


def shared_memory() -> tuple[Object, Object]:
    """A /dev/shm that is not limited to 64 MiB: NCCL and data workers pass tensors through it."""
    return _volume("shm", "/dev/shm", emptyDir={"medium": "Memory"})


def _volume(name: str, path: str, *, read_only: bool = False, **source: Object) -> tuple[Object, Object]:
    mount = {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}
    return {"name": name, **source}, mount
