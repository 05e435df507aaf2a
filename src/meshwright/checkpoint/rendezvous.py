"""Messages between the ranks of one save: small JSON files in a folder on one disk, no collectives.

A background thread must not use the training's process group, and a file of a killed run must not be taken for one of a
living rank. So each rank repeats random words that were drawn for this save:

    LEASE/begin.json       rank 0: {nonce, step, world}          the nonce is new for every save
    LEASE/hello-K.json     rank K: {nonce, id, tensors}          repeats the nonce; the id is new for every save
    PARTIAL/plan.json      rank 0: {ids, places}                 repeats all ids; the place of each tensor
    PARTIAL/state/rank-K.json  rank K: {id, pieces, files} or {id, error}    what it wrote, with digests
    LEASE/end.json         rank 0: {ids, error}                  committed, or why not

PARTIAL is the folder step-N.partial-<nonce> in LEASE, the folder of this generation of ranks: when another generation
begins, it is taken away, and nothing that is prepared there can be committed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from meshwright.checkpoint.files import dump_json
from meshwright.checkpoint.folder import step_folder
from meshwright.checkpoint.manifest import MANIFEST_CAP_BYTES, PARTS
from meshwright.disk import OWN_DISK, Disk
from meshwright.errors import Problem, RunFailed
from meshwright.files import parse_json

T = TypeVar("T")

_SHORTEST_WAIT_SECONDS = 0.002
_LONGEST_WAIT_SECONDS = 0.1


class Rendezvous:
    """One rank's side of one save. A wait of `timeout_seconds` raises RunFailed naming the missing ranks."""

    def __init__(
        self, lease: Path, step: int, rank: int, world: int, timeout_seconds: float, disk: Disk = OWN_DISK
    ) -> None:
        self.lease, self.step, self.rank, self.world = lease, step, rank, world
        self.timeout_seconds, self.disk = timeout_seconds, disk
        self.id = secrets.token_hex(8)
        self.nonce = ""
        self._ids: dict[int, str] = {}

    @property
    def partial(self) -> Path:
        """The folder of this save before its commit."""
        return step_folder(self.lease, self.step, "partial", self.nonce)

    # Rank 0

    def begin(self) -> None:
        """Rank 0: announces the save and makes its folder."""
        self.nonce = secrets.token_hex(8)
        for folder in (self.partial, *(self.partial / part for part in PARTS)):
            self.disk.make_folder(folder)
        record = {"nonce": self.nonce, "step": self.step, "world": self.world}
        self.disk.write(self.lease / "begin.json", dump_json(record), durable=False)

    def gather_hellos(self) -> list[Any]:
        """Rank 0: the tensors of each rank's `say_hello`, by rank, once all have repeated this save's nonce."""

        def hello_of(rank: int) -> Any:
            hello = self._read(self.lease / f"hello-{rank}.json")
            return hello if hello is not None and hello["nonce"] == self.nonce else None

        hellos = self._gather(hello_of, "no word from")
        self._ids = {rank: hello["id"] for rank, hello in enumerate(hellos)}
        return [hello["tensors"] for hello in hellos]

    def publish_plan(self, places: dict[str, Any]) -> None:
        """Rank 0: publishes where the model's tensors go. The files must exist."""
        ids = [self._ids[rank] for rank in range(self.world)]
        self.disk.write(self.partial / "plan.json", dump_json({"ids": ids, "places": places}), durable=False)

    def gather_parts(self) -> list[Any]:
        """Rank 0: every rank's report, by rank; removes the files. Raises RunFailed with a failed rank's words."""

        def part_of(rank: int) -> Any:
            part = self._read(self._part(rank))
            if part is None or part["id"] != self._ids[rank]:
                return None
            if "error" in part:
                raise RunFailed(Problem(f"rank {rank}, step {self.step}", part["error"]))
            return part

        parts = self._gather(part_of, "nothing written by")
        for rank in range(self.world):
            self.disk.remove(self._part(rank))
        self.disk.remove(self.partial / "plan.json")
        return parts

    def end(self, error: str = "") -> None:
        """Rank 0: publishes that the checkpoint is committed, or why it is not."""
        ids = {str(rank): word for rank, word in self._ids.items()}
        self.disk.write(self.lease / "end.json", dump_json({"ids": ids, "error": error}), durable=False)

    # Every rank

    def say_hello(self, tensors: Any) -> None:
        """Answers rank 0's announcement. Rank 0 calls this too, after `begin`."""
        record = {"nonce": self.nonce, "id": self.id, "tensors": tensors}
        self.disk.write(self.lease / f"hello-{self.rank}.json", dump_json(record), durable=False)

    def await_plan(self, tensors: Any) -> dict[str, Any]:
        """Answers announcements of this step until rank 0 publishes a plan; returns where the tensors go.

        An announcement of a dead run is answered too, but its plan can never repeat our id.
        """

        def planned() -> dict[str, Any] | None:
            begin = self._read(self.lease / "begin.json")
            if begin is None or begin["step"] != self.step or begin["world"] != self.world:
                return None
            if begin["nonce"] != self.nonce:
                self.nonce = begin["nonce"]
                self.say_hello(tensors)
            self.raise_if_failed()
            plan = self._read(self.partial / "plan.json")
            if plan is None or plan["ids"][self.rank] != self.id:
                return None
            places: dict[str, Any] = plan["places"]
            return places

        return self._wait(planned, lambda: "rank 0 has not answered this save")

    def report(self, part: dict[str, Any]) -> None:
        """Reports to rank 0 what this rank wrote, or its error."""
        self.disk.write(self._part(self.rank), dump_json({"id": self.id, **part}), durable=False)

    def await_end(self) -> None:
        """Waits for the commit. Raises RunFailed with rank 0's words if it failed."""

        def ended() -> bool | None:
            return True if self.raise_if_failed() else None

        self._wait(ended, lambda: "rank 0 has not committed the checkpoint")

    def raise_if_failed(self) -> bool:
        """Whether rank 0 has committed this save. Raises RunFailed if it failed."""
        end = self._read(self.lease / "end.json")
        if end is None or end["ids"].get(str(self.rank)) != self.id:
            return False
        if end["error"]:
            raise RunFailed(end["error"])
        return True

    def _part(self, rank: int) -> Path:
        return self.partial / "state" / f"rank-{rank}.json"

    def _read(self, path: Path) -> Any:
        data = self.disk.read(path, MANIFEST_CAP_BYTES)
        return None if data is None else parse_json(data, str(path))

    def _gather(self, message_of: Callable[[int], Any], missing: str) -> list[Any]:
        """Every rank's message, by rank, once `message_of` returns one for all."""
        messages: dict[int, Any] = {}

        def arrived() -> list[Any] | None:
            for rank in set(range(self.world)) - set(messages):
                if (message := message_of(rank)) is not None:
                    messages[rank] = message
            return [messages[rank] for rank in range(self.world)] if len(messages) == self.world else None

        return self._wait(arrived, lambda: f"{missing} {_ranks(set(range(self.world)) - set(messages))}")

    def _wait(self, ready: Callable[[], T | None], missing: Callable[[], str]) -> T:
        deadline_seconds = time.monotonic() + self.timeout_seconds
        pause_seconds = _SHORTEST_WAIT_SECONDS
        while True:
            result = ready()
            if result is not None:
                return result
            if time.monotonic() > deadline_seconds:
                where = f"rank {self.rank}, saving step {self.step}"
                raise RunFailed(Problem(where, f"{missing()} after {self.timeout_seconds:g} s"))
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _LONGEST_WAIT_SECONDS)


def _ranks(ranks: set[int]) -> str:
    words = [str(rank) for rank in sorted(ranks)]
    return ("rank " if len(words) == 1 else "ranks ") + ", ".join(words)
