"""What happens to the hosts of a run: a fault, and what is mended once training goes on without them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.launch.measure import Trial

TWO_FAULTS_SECONDS = 2.0
#: For the others to find a coordinator that was started again.
COORDINATOR_SECONDS = 5.0


@dataclass(frozen=True)
class Fault:
    """`words` say what happens; `mend`, if any, is done once steps go on after `strike`, and `before` hosts train from
    the start."""

    words: str
    strike: Callable[[Trial], None]
    mend: Callable[[Trial], None] | None = None
    before: int = 3


def kill_rank(trial: Trial) -> None:
    """kill -9 of the rank on host-2, whose agent lives."""
    os.kill(trial.rank_pid("host-2"), signal.SIGKILL)


def kill_host(trial: Trial) -> None:
    """Every process of host-3 dies; the others' connections to it are closed by its kernel."""
    trial.host("host-3").kill()


def cut_cable(trial: Trial) -> None:
    """host-3 lives and nobody is told."""
    trial.host("host-3").cut()


def mend_cable(trial: Trial) -> None:
    trial.host("host-3").mend()


def start_host(trial: Trial) -> None:
    trial.start("host-3")


def stop_saver(trial: Trial) -> None:
    """The host whose rank commits is held still."""
    trial.stopped = trial.saver()
    trial.host(trial.stopped).stop()


def continue_saver(trial: Trial) -> None:
    trial.host(trial.stopped).go_on()


def kill_rank_then_host(trial: Trial) -> None:
    kill_rank(trial)
    time.sleep(TWO_FAULTS_SECONDS)
    kill_host(trial)


def restart_coordinator(trial: Trial) -> None:
    """The coordinating process dies, another is started in its place, and then a rank dies."""
    trial.host("host-4").kill()
    time.sleep(TWO_FAULTS_SECONDS)
    trial.start("host-4")
    time.sleep(COORDINATOR_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # ranks may have died with the coordinator
        kill_rank(trial)


FAULTS: Mapping[str, Fault] = {
    "rank": Fault("a rank killed (-9)", kill_rank),
    "host": Fault("every process of a host killed; started again", kill_host, start_host),
    "cable": Fault("a host's cable cut; mended", cut_cable, mend_cable),
    "stop": Fault("the host that saves stopped; continued", stop_saver, continue_saver),
    "two": Fault("a rank killed, 2 s later another host; started again", kill_rank_then_host, start_host),
    "grow": Fault("a third host joins two", start_host, before=2),
    "coordinator": Fault("the coordinator killed and started again; then a rank killed", restart_coordinator),
}
