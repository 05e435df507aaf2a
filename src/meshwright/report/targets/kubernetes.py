"""Kubernetes: a JobSet, a TrainJob, a Job that Kueue may shrink, RayJob, RayService, a Knative service, a container."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshwright.report.targets import kuberay, pods
from meshwright.report.targets.job import RUN_VOLUME, Handout, ScheduledJob, missing_paths
from meshwright.report.targets.pods import Object
from meshwright.report.targets.scripts import SERVE_PORT
from meshwright.report.targets.text import yaml_text

#: A driver that fails is started again this often, and resumes; exit codes 2 and 3 say that it never can work.
DRIVER_RETRIES = 6
AGENT_RETRIES = 100
#: Longest that a request to the model server may take.
REQUEST_SECONDS = 600
COMMON, SECRET = "common.yaml", "secret.yaml"


def handout(job: ScheduledJob) -> Handout:
    """common.yaml and secret.yaml, which every kind needs, and a file for each kind; one of these is to be applied."""
    omitted = _omitted(job)
    partial = bool(job.queue) and job.nodes_min < job.nodes
    chosen = "job.yaml" if partial else "jobset.yaml"
    head = [f"{job.name}: {job.summary}", f"apply after {COMMON} and {SECRET}, and apply only one kind of job"]
    files = {
        COMMON: yaml_text(
            [
                (
                    [head[0], "what every kind of job needs", *(f"not said here: {one}" for one in omitted)],
                    pods.config_map(job),
                ),
                (["agents find the driver by this name"], pods.hub_service(job)),
                (["the run folder, which outlives the job: delete it by hand"], pods.run_claim(job)),
            ]
        ),
        SECRET: yaml_text([(["the job's secrets: keep this file to yourself"], pods.secret(job))]),
        "jobset.yaml": yaml_text([([*head, "JobSet, with Kueue's queue where one is named"], _jobset(job))]),
        "trainjob.yaml": yaml_text(
            [([*head, "Kubeflow Trainer: the runtime, then the job"], _runtime(job)), ([], _trainjob(job))]
        ),
        **({"job.yaml": _partial(job, head)} if partial else {}),
        "rayjob.yaml": yaml_text([([*head, "KubeRay: a Ray cluster for this job alone"], kuberay.rayjob(job))]),
        "rayservice.yaml": yaml_text(
            [
                ([head[0], "KubeRay: the trained model, served by Ray Serve"], kuberay.application_files(job)),
                ([], kuberay.rayservice(job)),
            ]
        ),
        "serve.yaml": yaml_text(
            [([head[0], "Knative: the trained model, served; no pod while nobody asks"], _knative(job))]
        ),
        "Containerfile": _containerfile(job),
    }
    submit = tuple(("kubectl", "apply", "--filename", name) for name in (COMMON, SECRET, chosen))
    return Handout(files, tuple(omitted), submit, frozenset({SECRET}))


def _jobset(job: ScheduledJob) -> Object:
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": pods.metadata(job, queued=True),
        "spec": {
            # Kueue starts what it admits; without a queue it starts at once.
            "suspend": bool(job.queue),
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            **_replicated(job, pods.DRIVER, {}),
        },
    }


def _runtime(job: ScheduledJob) -> Object:
    """A TrainingRuntime whose trainer step is the driver: Trainer tells that step where to post its progress."""
    label = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    metadata = pods.metadata(job)
    metadata["labels"] = {**metadata["labels"], "trainer.kubeflow.org/framework": "meshwright"}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": metadata,
        "spec": {
            "mlPolicy": {"numNodes": 1},
            "template": {
                "spec": {
                    "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                    **_replicated(job, "node", label),
                }
            },
        },
    }


def _trainjob(job: ScheduledJob) -> Object:
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.short_name}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": pods.metadata(job, queued=True),
        "spec": {"runtimeRef": reference, "suspend": bool(job.queue), "trainer": {"image": job.image, "numNodes": 1}},
    }


def _replicated(job: ScheduledJob, container: str, driver_labels: dict[str, str]) -> Object:
    """The driver and the agents of a JobSet, which is done when the driver is."""
    metadata = {"metadata": {"labels": driver_labels}} if driver_labels else {}
    driver = {**metadata, "spec": _driver_job(job, container)}
    jobs = [{"name": pods.DRIVER, "template": driver}, {"name": pods.AGENT, "template": {"spec": _agents_job(job)}}]
    return {
        "successPolicy": {"operator": "All", "targetReplicatedJobs": [pods.DRIVER]},
        "replicatedJobs": [{"name": one["name"], "replicas": 1, "template": one["template"]} for one in jobs],
    }


def _driver_job(job: ScheduledJob, container: str) -> Object:
    never = {"action": "FailJob", "onExitCodes": {"containerName": container, "operator": "In", "values": [2, 3]}}
    return {
        "parallelism": 1,
        "completions": 1,
        "completionMode": "Indexed",
        "backoffLimit": DRIVER_RETRIES,
        "podFailurePolicy": {"rules": [_disruption(), never]},
        "template": pods.driver_pod(job, container=container),
    }


def _agents_job(job: ScheduledJob) -> Object:
    return {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": AGENT_RETRIES,
        "podFailurePolicy": {"rules": [_disruption()]},
        "template": pods.agent_pod(job),
    }


def _disruption() -> Object:
    """A pod that was evicted or preempted has not failed."""
    return {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _partial(job: ScheduledJob, head: Iterable[str]) -> str:
    """Two Jobs, of which Kueue may admit the agents' with fewer pods. It can do that with this kind alone."""
    agents = pods.metadata(job, "-agents", queued=True)
    agents["annotations"] = {
        **agents["annotations"],
        "kueue.x-k8s.io/job-min-parallelism": str(job.nodes_min),
        "kueue.x-k8s.io/job-completions-equal-parallelism": "true",
    }
    kind = {"apiVersion": "batch/v1", "kind": "Job"}
    driver = {**_driver_job(job, pods.DRIVER), "suspend": True}
    words = f"Kueue admits {job.nodes_min} to {job.nodes} agents, as there is room"
    return yaml_text(
        [
            ([*head, words], {**kind, "metadata": agents, "spec": {**_agents_job(job), "suspend": True}}),
            ([], {**kind, "metadata": pods.metadata(job, "-driver", queued=True), "spec": driver}),
        ]
    )


def _knative(job: ScheduledJob) -> Object:
    """A Knative service: as many pods as requests need, none while there are none."""
    limits: dict[str, str] = pods.node_limits(job)
    if job.resource:
        limits[job.resource] = str(job.serve_devices)
    mounts = [pods.job_files(job), pods.secret_files(job, pods.TOKEN_FILE), pods.run_volume(job, read_only=True)]
    template = pods.pod(job, pods.SERVER, pods.SERVER, "serve.sh", limits, mounts, restart=None)
    # Knative decides these itself, and gives volumes to no group: the token must be readable without one.
    for name in ("terminationGracePeriodSeconds", "securityContext"):
        del template["spec"][name]
    for volume in template["spec"]["volumes"]:
        if "secret" in volume:
            volume["secret"]["defaultMode"] = 0o444
    container: dict[str, Any] = template["spec"]["containers"][0]
    container["ports"] = [{"name": "http1", "containerPort": SERVE_PORT}]
    container["readinessProbe"] = {"httpGet": {"path": "/health", "port": SERVE_PORT}}
    annotations = {
        "autoscaling.knative.dev/min-scale": "0",
        "autoscaling.knative.dev/max-scale": str(job.nodes),
        "autoscaling.knative.dev/target": str(job.serve_at_once),
    }
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": pods.metadata(job, "-serve"),
        "spec": {
            "template": {
                "metadata": {**template["metadata"], "annotations": annotations},
                "spec": {"timeoutSeconds": REQUEST_SECONDS, **template["spec"]},
            }
        },
    }


def _containerfile(job: ScheduledJob) -> str:
    return f"""\
# The image {job.image}: Meshwright {job.version} with Ray, for a user without rights.
# build, from the folder of Meshwright's sources:
#   podman build --file Containerfile --tag {job.image} SOURCES
FROM docker.io/library/python:3.12-slim-bookworm
RUN useradd --uid {pods.USER} --create-home meshwright \\
 && mkdir --parents {RUN_VOLUME} \\
 && chown meshwright {RUN_VOLUME}
COPY . /opt/meshwright
RUN pip install --no-cache-dir "/opt/meshwright[ray]" "ray[default,serve]=={kuberay.RAY_VERSION}"
USER {pods.USER}
WORKDIR /home/meshwright
"""


def _omitted(job: ScheduledJob) -> list[str]:
    omitted = [
        "the image: build it from the Containerfile and push it to where the cluster pulls from (--image NAME)",
        *missing_paths(job, "into the image or a volume"),
        f"the class of the volume of the run: the cluster's default is asked for {job.storage_bytes >> 30} GiB",
    ]
    if job.resource:
        omitted.append(
            f"the kind of device: any {job.resource} is asked for, not {job.device}; add a nodeSelector for it"
        )
    if job.nodes > 1:
        omitted.append("how near the nodes lie: Kueue's topology or a podAffinity says it")
    if job.queue is None:
        omitted.append("a queue: --queue NAME adds Kueue's label, and the job waits until Kueue admits it")
    if job.nodes_min < job.nodes:
        way = (
            "job.yaml is the one that Kueue may admit in part"
            if job.queue
            else "a queue of Kueue is needed (--queue NAME)"
        )
        omitted.append(f"a start with {job.nodes_min} of {job.nodes} nodes in a JobSet, TrainJob or RayJob: {way}")
    omitted.append(
        "the agents' number in trainjob.yaml's trainer.numNodes: its trainer is the driver, which posts the progress; "
        "the runtime has the agents"
    )
    omitted.append("a volume in serve.yaml, unless Knative's feature kubernetes.podspec-persistent-volume-claim is on")
    omitted.append(
        "a volume that pods of several nodes read at once: the run's is ReadWriteOnce, so servers run on one node "
        "until its class allows more"
    )
    return omitted
