"""What a stranger does to a run of torchelastic or torchft from a host of its own, without credentials.

    python -m bench.launch.stranger [--systems torchelastic torchft] --out FOLDER

The stranger knows the address of the coordinating host, and reaches the others as any host of the network does. All
hosts are network namespaces of this machine; what the stranger makes them run writes a host's name to a file. Prints a
table.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.launch.faults import COORDINATOR
from bench.launch.measure import STRANGER, Trial, trials, wait_for
from bench.launch.systems import (
    HERE,
    HOSTS_LEAST,
    LIGHTHOUSE_PORT,
    REPLICA_PORT,
    STORE_PORT,
    SYSTEMS,
    Command,
    torchrun,
)

PATIENCE_SECONDS = 60.0
Act = Callable[[Trial, Path], bool]


def run(trial: Trial, code: str, *words: str) -> str:
    """The output of Python code on the stranger's host."""
    done = trial.host(STRANGER).run([sys.executable, "-c", code, *words])
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


# torchelastic: its store answers everyone, and its agents unpickle the state that lies there.
STORE = f"""
import sys, torch.distributed as dist
store = dist.TCPStore(sys.argv[1], {STORE_PORT}, is_master=False, wait_for_workers=False)
"""
LIST = STORE + "print(*store.list_keys(), sep='\\n')"
WRITE = STORE + "store.set(sys.argv[2], sys.argv[3])"


def rendezvous_key(trial: Trial) -> str:
    """The key of the rendezvous, found by listing the store."""
    keys = run(trial, LIST, trial.host(COORDINATOR).address).split()
    return min((key for key in keys if key.startswith("torch.rendezvous.")), key=len)  # others begin with it


def lists_keys(trial: Trial, mark: Path) -> bool:
    return bool(rendezvous_key(trial))


def joins(trial: Trial, mark: Path) -> bool:
    """Starts what a host of the run would start, and is summed with the others."""
    trial.start(STRANGER)
    return trial.first(lambda line: line.host == STRANGER, PATIENCE_SECONDS) is not None


def runs_code_by_state(trial: Trial, mark: Path) -> bool:
    """Writes a pickle over the state of the rendezvous, which every agent reads."""
    written = f"cposix\nsystem\n(Vhostname >> {mark}\ntR."  # the pickle of a call of os.system, by hand
    state = base64.b64encode(written.encode()).decode()
    key = rendezvous_key(trial)
    run(trial, WRITE, trial.host(COORDINATOR).address, key, state)
    return ran_on_other_hosts(mark)


def ends_run_by_state(trial: Trial, mark: Path) -> bool:
    """Writes nonsense over the state of the rendezvous."""
    run(trial, WRITE, trial.host(COORDINATOR).address, rendezvous_key(trial), "!")
    return wait_for(lambda: not any(trial.host(f"host-{number}").processes() for number in (1, 2)), PATIENCE_SECONDS)


def ran_on_other_hosts(mark: Path) -> bool:
    return wait_for(lambda: mark.exists() and bool(set(mark.read_text().split()) - {STRANGER}), PATIENCE_SECONDS)


# torchft: its lighthouse tells everyone who takes part, and a replica unpickles the state of any other.
GET = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"
POST = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], data=b'', timeout=10)"


def lighthouse(trial: Trial) -> str:
    return f"http://{trial.host(COORDINATOR).address}:{LIGHTHOUSE_PORT}"


def replicas(trial: Trial) -> list[str]:
    """Names of the replicas, from the lighthouse's own page."""
    return sorted(set(re.findall(r"/replica/([^/\"]+)/kill", run(trial, GET, f"{lighthouse(trial)}/status"))))


def lists_replicas(trial: Trial, mark: Path) -> bool:
    return bool(replicas(trial))


def ends_replica(trial: Trial, mark: Path) -> bool:
    """Presses the page's button for a replica; its process is another afterwards."""
    name = replicas(trial)[0]
    host = urllib.parse.unquote(name).partition(":")[0]
    before = trial.rank_pid(host)
    with contextlib.suppress(RuntimeError):  # the replica dies before it answers
        run(trial, POST, f"{lighthouse(trial)}/replica/{name}/kill")
    return wait_for(lambda: not Path(f"/proc/{before}").exists(), PATIENCE_SECONDS)


def runs_code_by_replica(trial: Trial, mark: Path) -> bool:
    """Joins with the highest step of all: the others take its state for theirs."""
    words = torchrun(
        "--nnodes=1",
        f"--master-addr={STRANGER}",
        f"--master-port={REPLICA_PORT}",
        str(HERE / "stranger_rank.py"),
        f"hostname >> {mark}",
    )
    trial.start_command(STRANGER, Command(words, {"TORCHFT_LIGHTHOUSE": lighthouse(trial)}))
    return ran_on_other_hosts(mark)


ACTS: Mapping[str, Mapping[str, Act]] = {
    "torchelastic": {
        "lists the store's keys, the run's name among them": lists_keys,
        "joins as a rank": joins,
        "runs a command on the hosts of the run, by a pickle for its state": runs_code_by_state,
        "ends the run": ends_run_by_state,
    },
    "torchft": {
        "lists the replicas": lists_replicas,
        "joins as a replica": joins,
        "runs a command on the hosts of the run, by a pickle for their weights": runs_code_by_replica,
        "ends a replica": ends_replica,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=ACTS, default=list(ACTS))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    print("| launcher | what the stranger does | done |\n|---|---|---|")
    for system in asked.systems:
        for words, act in ACTS[system].items():
            with trials(SYSTEMS[f"{system}-tuned"], asked.out.resolve(), f"stranger-{system}") as trial:
                trial.begin(HOSTS_LEAST)
                print(f"| {system} | {words} | {'yes' if act(trial, trial.folder / 'mark') else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
