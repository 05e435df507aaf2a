"""A real Ray cluster on hosts of a test: a head and nodes, which ask everybody for a token.

Each host keeps Ray's folder in its own /dev/shm, so that nothing is on the shared disk, and nothing is left.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, hosts

PORT = 6379
FOLDER = "/dev/shm/ray"
OBJECT_STORE_BYTES = 80 * 1024 * 1024  # the least that Ray takes is 75 MiB
#: Starting is 4 s on an idle core; the machine may be full of other tests.
PATIENCE_SECONDS = 120.0


class RayCluster:
    """A cluster at work. `address` is HOST:PORT of the head; `token` a file that only this user can read.

    `environment` is what a driver needs on any of the hosts: Ray's token, and no report to its makers.
    """

    def __init__(self, made: Sequence[Host], folder: Path, cpus: int) -> None:
        self.hosts = tuple(made)
        self.head = self.hosts[0]
        self.address = f"{self.head.address}:{PORT}"
        self.folder = folder
        self.token = folder / "token"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self._cpus = cpus

    def start(self, *made: Host) -> None:
        """Starts Ray on hosts, all at once; returns when they are members. Also again, after a host was killed."""
        logs = [self.folder / f"ray-{host.name}.log" for host in made]
        starting = [self._start(host, log) for host, log in zip(made, logs, strict=True)]
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process, log in zip(starting, logs, strict=True):
            code = process.wait(deadline - time.monotonic())
            assert code == 0, f"ray start ended with {code}:\n{log.read_text()}"

    def drive(self, script: str, *arguments: str, host: Host | None = None, **options: Any) -> Any:
        """The CompletedProcess of a Python script on a host (the head), in the environment of a driver."""
        options.setdefault("env", self.environment)
        return (host or self.head).run([sys.executable, "-c", script, *arguments], **options)

    def _start(self, host: Host, log: Path) -> Any:
        place = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        with log.open("wb") as file:
            return host.start(
                [
                    str(Path(sys.executable).with_name("ray")),
                    "start",
                    *(place if host is self.head else [f"--address={self.address}"]),
                    f"--node-ip-address={host.address}",
                    f"--temp-dir={FOLDER}",
                    f"--num-cpus={self._cpus}",
                    f"--object-store-memory={OBJECT_STORE_BYTES}",
                ],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )


@contextlib.contextmanager
def ray_cluster(folder: Path, nodes: int = 3, spare: int = 0, cpus: int = 2) -> Iterator[RayCluster]:
    """Ray on that many hosts, the head among them, each with that many CPUs; all ended afterwards. Skips without Ray.

    `spare` hosts more, the last of `hosts`, have no Ray until `start` is called for them.
    """
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'meshwright[ray]'")
    folder.mkdir(parents=True, exist_ok=True)
    with hosts(nodes + spare) as made:
        cluster = RayCluster(made, folder, cpus)
        cluster.token.touch(mode=0o600)
        cluster.token.write_text(secrets.token_hex(32))
        cluster.start(cluster.head)
        cluster.start(*made[1:nodes])
        yield cluster
