"""KubeRay: a Ray cluster that lives as long as the job, and one that serves the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshwright.report.targets import pods
from meshwright.report.targets.job import ACCESS_FOLDER, JOB_FOLDER, ScheduledJob
from meshwright.report.targets.pods import Object
from meshwright.report.targets.text import mebibytes, yaml_text

#: The version in the image; tokens need 2.52 or newer.
RAY_VERSION = "2.60.0"
#: A job that fails is started again this often, in a new cluster, and resumes.
RETRIES = 3
#: How long the cluster of a job that has ended can still be looked at.
SECONDS_AFTER_END = 600
HEAD_MEMORY_BYTES = 8 << 30
APPLICATION = Path(__file__).with_name("ray_serve_app.txt")
APPLICATION_FOLDER = "/etc/meshwright/serve"


def rayjob(job: ScheduledJob) -> Object:
    """A RayJob: Ray places the ranks; the driver runs on the head, which has the run's volume and no rank."""
    workers = _group(job, job.nodes_min, job.nodes, [pods.job_files(job), pods.shared_memory()])
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": pods.metadata(job, queued=True),
        "spec": {
            "entrypoint": f"sh {JOB_FOLDER}/ray-driver.sh",
            "entrypointNumCpus": 0,
            "suspend": bool(job.queue),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": SECONDS_AFTER_END,
            "backoffLimit": RETRIES,
            "rayClusterSpec": _cluster(job, [pods.job_files(job), pods.run_volume(job)], workers),
        },
    }


def rayservice(job: ScheduledJob) -> Object:
    """A RayService whose replicas each run the model server behind Ray Serve's address."""
    volume = {"name": "serve", "configMap": {"name": f"{job.short_name}-ray-serve"}}
    mounts = [
        (volume, {"name": "serve", "mountPath": APPLICATION_FOLDER, "readOnly": True}),
        pods.secret_files(job, pods.TOKEN_FILE),
        pods.run_volume(job, read_only=True),
        pods.shared_memory(),
    ]
    deployment = {
        "name": "Model",
        "max_ongoing_requests": job.serve_at_once,
        "autoscaling_config": {"min_replicas": 0, "initial_replicas": 1, "max_replicas": job.nodes},
        "ray_actor_options": {"num_gpus": job.serve_devices} if job.resource else {"num_cpus": job.cores},
    }
    config: dict[str, Any] = {
        "applications": [
            {
                "name": job.short_name,
                "import_path": "meshwright_app:application",
                "route_prefix": "/",
                "runtime_env": {"env_vars": {"PYTHONPATH": APPLICATION_FOLDER}},
                "args": {"run": pods.run_of(job), "token": f"{ACCESS_FOLDER}/{pods.TOKEN_FILE}"},
                "deployments": [deployment],
            }
        ]
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": pods.metadata(job, "-serve"),
        "spec": {
            "serveConfigV2": yaml_text([([], config)]),
            "rayClusterConfig": _cluster(job, mounts, _group(job, 1, job.nodes, mounts)),
        },
    }


def application_files(job: ScheduledJob) -> Object:
    """The ConfigMap with the application that Ray Serve imports."""
    files = {"meshwright_app.py": APPLICATION.read_text(encoding="utf-8")}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": pods.metadata(job, "-ray-serve"), "data": files}


def _cluster(job: ScheduledJob, mounts: list[tuple[Object, Object]], workers: Object) -> Object:
    """A cluster that asks for its token, which KubeRay makes, with no rank on its head."""
    limits = {"cpu": str(pods.DRIVER_CORES), "memory": f"{mebibytes(HEAD_MEMORY_BYTES)}Mi"}
    head = pods.pod(job, pods.DRIVER, "ray-head", None, limits, mounts, restart=None)
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"}, "template": head},
        "workerGroupSpecs": [workers],
    }


def _group(job: ScheduledJob, least: int, most: int, mounts: list[tuple[Object, Object]]) -> Object:
    template = pods.pod(job, pods.AGENT, "ray-worker", None, pods.node_limits(job), mounts, restart=None)
    counts = {"replicas": most, "minReplicas": least, "maxReplicas": most}
    return {"groupName": "nodes", **counts, "rayStartParams": {}, "template": template}
