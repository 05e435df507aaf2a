"""Launchers that are measured: what each runs on the host that coordinates, and on every host that trains.

Another launcher is one more row of SYSTEMS: its ranks write the lines of steps.py.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

HERE = Path(__file__).parent
#: The run ends by itself far later than any measurement.
LAST_STEP = 100_000
HOSTS_LEAST, HOSTS_MOST = 2, 3
STORE_PORT, LIGHTHOUSE_PORT, REPLICA_PORT, HUB_PORT = 29_400, 29_510, 29_600, 29_700
RUN = "bench"


@dataclass(frozen=True)
class Command:
    """What is started on a host: words, and environment variables beside those of this process."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class System(Protocol):
    """A launcher under test. `coordinator` is the address of the host that trains nothing, `address` that of `host`."""

    def service(self, folder: Path, coordinator: str) -> Command | None:
        """What the coordinating host runs, if anything."""

    def agent(self, folder: Path, host: str, address: str, coordinator: str) -> Command:
        """What a host that trains runs, whether it is there from the start, joins, or comes back."""

    def versions(self) -> str:
        """Names and versions of what is measured."""


def torchrun(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *words]


@dataclass(frozen=True)
class Elastic:
    """torchrun with its c10d rendezvous. The store is a process of the coordinating host, which is kinder than the
    usual choice of a host that trains. `timeout_seconds` is that of collectives, 0 for torch's own."""

    settings: str = ""
    shared_store: bool = True
    timeout_seconds: float = 0.0

    def service(self, folder: Path, coordinator: str) -> Command | None:
        lines = (
            "import time, torch.distributed as dist",
            f"store = dist.TCPStore({coordinator!r}, {STORE_PORT}, is_master=True, wait_for_workers=False)",
            "time.sleep(86400)",
        )
        return Command([sys.executable, "-c", "\n".join(lines)])

    def agent(self, folder: Path, host: str, address: str, coordinator: str) -> Command:
        conf = ",".join(filter(None, ("is_host=0", self.settings)))
        words = torchrun(
            f"--nnodes={HOSTS_LEAST}:{HOSTS_MOST}",
            "--nproc-per-node=1",
            "--max-restarts=100",
            "--rdzv-backend=c10d",
            f"--rdzv-id={RUN}",
            f"--rdzv-endpoint={coordinator}:{STORE_PORT}",
            f"--rdzv-conf={conf}",
            f"--local-addr={host}",
            str(HERE / "elastic_rank.py"),
        )
        share = "0" if self.shared_store else "1"
        return Command(
            [*words, str(folder), str(LAST_STEP), str(self.timeout_seconds)],
            {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": share},
        )

    def versions(self) -> str:
        return f"torch {importlib.metadata.version('torch')}"


@dataclass(frozen=True)
class Torchft:
    """torchft: its lighthouse on the coordinating host, a replica of one rank on each other, which torchrun starts
    again when it dies. `timeout_seconds` is that of collectives and quorum, 0 for torchft's own."""

    settings: tuple[str, ...] = ()
    timeout_seconds: float = 0.0

    def service(self, folder: Path, coordinator: str) -> Command | None:
        lighthouse = str(Path(sys.executable).with_name("torchft_lighthouse"))
        return Command([lighthouse, f"--min_replicas={HOSTS_LEAST}", *self.settings], {"RUST_BACKTRACE": "0"})

    def agent(self, folder: Path, host: str, address: str, coordinator: str) -> Command:
        words = torchrun(
            "--nnodes=1",
            "--nproc-per-node=1",
            "--max-restarts=100",
            f"--master-addr={host}",
            f"--master-port={REPLICA_PORT}",
            str(HERE / "torchft_rank.py"),
        )
        return Command(
            [*words, str(folder), str(LAST_STEP), str(self.timeout_seconds), host],
            {"TORCHFT_LIGHTHOUSE": f"http://{coordinator}:{LIGHTHOUSE_PORT}"},
        )

    def versions(self) -> str:
        return f"torchft-nightly {importlib.metadata.version('torchft-nightly')}"


@dataclass(frozen=True)
class Meshwright:
    """Our launcher: a driver on the coordinating host, agents on the others. It has no settings for speed."""

    def service(self, folder: Path, coordinator: str) -> Command | None:
        words = [sys.executable, str(HERE / "meshwright_driver.py"), str(folder), str(LAST_STEP)]
        return Command([*words, f"{coordinator}:{HUB_PORT}", str(HOSTS_LEAST)], self._environment())

    def agent(self, folder: Path, host: str, address: str, coordinator: str) -> Command:
        words = [sys.executable, "-m", "meshwright.launch.agent", "--run", str(folder), "--devices", "1"]
        return Command(words, self._environment())

    def versions(self) -> str:
        return f"meshwright {importlib.metadata.version('meshwright')}"

    def _environment(self) -> Mapping[str, str]:
        return {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}


SYSTEMS: Mapping[str, System] = {
    "torchelastic": Elastic(),
    "torchelastic-tuned": Elastic(
        "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3", shared_store=False, timeout_seconds=5
    ),
    "torchft": Torchft(),
    "torchft-tuned": Torchft(
        ("--heartbeat_timeout_ms=2000", "--join_timeout_ms=1000", "--quorum_tick_ms=50"), timeout_seconds=5
    ),
    "meshwright": Meshwright(),
}


def environment(command: Command, interface: str) -> dict[str, str]:
    """The whole environment of a command, with gloo bound to `interface`."""
    threads = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    return {**os.environ, **threads, **command.environment}
