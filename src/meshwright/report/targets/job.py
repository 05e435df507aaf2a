"""What a scheduler is told of a job, as plain values, and what is written for it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

#: Longest name that is given to objects: what Kubernetes, JobSet, KubeRay and YARN append still fits into their limits.
LONGEST_NAME = 40
#: Where the files of a job, its secrets and its run lie in a container.
JOB_FOLDER = "/etc/meshwright/job"
ACCESS_FOLDER = "/etc/meshwright/access"
RUN_VOLUME = "/var/lib/meshwright"
GIB = 1 << 30


@dataclass(frozen=True)
class Access:
    """What lets agents and their driver trust each other without a shared disk: the secrets of the driver's hub by
    scope, and its certificate with the private key, both as PEM. `token` is for clients of the model server."""

    join: str
    read: str
    act: str
    certificate: str
    key: str
    token: str

    def for_agents(self, address: str) -> str:
        """The access file of an agent, JSON: where the hub listens, by which certificate it is known, and the secret
        of those that join it."""
        return json.dumps({"address": address, "secret": self.join, "certificate": self.certificate}) + "\n"

    def for_hub(self) -> str:
        """What the hub takes for its own, where it is RUN/hub/access.json before the driver starts."""
        names = ("join", "read", "act", "certificate", "key")
        return json.dumps({name: getattr(self, name) for name in names}) + "\n"


@dataclass(frozen=True, kw_only=True)
class ScheduledJob:
    """A planned job, as a scheduler has to know it. Devices, cores and bytes are those of one node.

    `name` is the user's, `summary` says in words what runs, `job_toml` is the job file, `run` and `folder` are absolute
    paths of the run and of the files that are written, `python` the interpreter that Meshwright is installed for.
    `nodes_min` nodes are enough to work with. `resource` is Kubernetes' name of the device, "" for CPU cores, and
    `device` that of our table. `paths` are files and folders of this machine that the job reads.
    """

    name: str
    summary: str
    job_toml: str
    run: str
    folder: str
    python: str
    nodes: int
    nodes_min: int
    devices: int
    device: str
    resource: str
    cores: int
    memory_bytes: int
    checkpoint_bytes: int
    checkpoints_kept: int
    grace_seconds: int
    port: int
    image: str
    version: str
    access: Access
    serve_devices: int = 1
    serve_at_once: int = 1
    spot: bool = False
    queue: str | None = None
    paths: tuple[str, ...] = ()

    @property
    def short_name(self) -> str:
        """The name as letters, digits and dashes, which begins with a letter: what every target accepts."""
        return label_of(self.name)

    @property
    def storage_bytes(self) -> int:
        """What the run folder needs: the checkpoints that are kept, one that is being written, and 2 GiB."""
        return self.checkpoint_bytes * (self.checkpoints_kept + 1) + 2 * GIB

    def driver(self, *, job_file: str, run: str, address: str | None) -> list[str]:
        """The words that start the driver: its hub listens on `address`, or Ray runs it (None), which knows where it is
        itself. It resumes with --resume after them."""
        on = ["launch.on=ray"] if address is None else ["launch.on=agents", f"launch.address={address}"]
        return ["train", job_file, *on, "--run", run]

    def agent(self, *where: str) -> list[str]:
        """The words that start the agent of a node, which finds the hub by `where`."""
        limits = ["--devices", str(self.devices), "--grace", str(self.grace_seconds)]
        return ["-m", "meshwright.launch.agent", *where, *limits]


@dataclass(frozen=True)
class Handout:
    """What is given to a scheduler: files by name, those of them that only their owner may read, what the target
    cannot express, in sentences, and the commands that submit the files from their folder."""

    files: Mapping[str, str]
    omitted: tuple[str, ...]
    submit: tuple[tuple[str, ...], ...]
    private: frozenset[str] = field(default_factory=frozenset)


def label_of(name: str) -> str:
    """A name of RFC 1123 and RFC 1035 for any text, of at most LONGEST_NAME characters. One that is cut, or of which
    nothing is left, ends with digits of its digest, so that two such names differ."""
    left = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    label = left if left[:1].isalpha() else f"job-{left}".rstrip("-")
    if left and len(label) <= LONGEST_NAME:
        return label
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{label[: LONGEST_NAME - 7].rstrip('-')}-{digest}"


def missing_paths(job: ScheduledJob, where: str) -> list[str]:
    """A sentence on the files of this machine that the job reads, for targets without its disk."""
    if not job.paths:
        return []
    return [f"files of this machine that the job reads ({', '.join(job.paths)}): put them {where} under the same paths"]


def whole_nodes(job: ScheduledJob) -> list[str]:
    """A sentence for targets that give all nodes or none."""
    if job.nodes_min == job.nodes:
        return []
    return [f"a start with {job.nodes_min} of {job.nodes} nodes (launch.devices_min): it starts with all of them"]
