"""What happens to the hosts of a run: a fault, and what is mended once training goes on without them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.launch.measure import Trial

COORDINATOR = "host-4"


@dataclass(frozen=True)
class Fault:
    """`words` say what happens. `strikes` are done one after another, each so many seconds after the one before it; the
    last counts. `mend`, if any, is done once steps go on, and `before` hosts train from the start."""

    words: str
    strikes: tuple[tuple[float, Callable[[Trial], None]], ...]
    mend: Callable[[Trial], None] | None = None
    before: int = 3


def kill_rank(trial: Trial) -> None:
    """kill -9 of the rank on host-2, whose agent lives; it may have died with a coordinator."""
    with contextlib.suppress(ProcessLookupError):
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


def kill_coordinator(trial: Trial) -> None:
    trial.host(COORDINATOR).kill()


def start_coordinator(trial: Trial) -> None:
    trial.start(COORDINATOR)


FAULTS: Mapping[str, Fault] = {
    "rank": Fault("a rank killed (-9)", ((0, kill_rank),)),
    "host": Fault("every process of a host killed; started again", ((0, kill_host),), start_host),
    "cable": Fault("a host's cable cut; mended", ((0, cut_cable),), mend_cable),
    "stop": Fault("the host that saves stopped; continued", ((0, stop_saver),), continue_saver),
    "two": Fault("a rank killed, 2 s later another host; started again", ((0, kill_rank), (2, kill_host)), start_host),
    "grow": Fault("a third host joins two", ((0, start_host),), before=2),
    "coordinator": Fault(
        "the coordinator killed, started again after 2 s, and 5 s later a rank killed",
        ((0, kill_coordinator), (2, start_coordinator), (5, kill_rank)),
    ),
}
