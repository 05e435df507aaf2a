"""How far the logs of a node that does not share the driver's disk have gone to the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from meshwright.launch.wire import hub_pb2 as wire


class SentLogs:
    """The logs of one generation, (role, rank) -> file, from what is in them now on: earlier generations sent theirs.

    What is written to a connection may be lost with it. The hub answers beats: all that was sent before one that it
    has answered has arrived, and after a reconnection `go_back` has everything else sent again. The hub takes each byte
    once, by its offset.
    """

    def __init__(self, logs: Mapping[tuple[str, int], Path]) -> None:
        self._logs = logs
        self._sent = {key: path.stat().st_size if path.exists() else 0 for key, path in logs.items()}
        self._arrived = dict(self._sent)
        self._before_beats: dict[int, dict[tuple[str, int], int]] = {}  # what was sent before each unanswered beat

    def unsent(self) -> Iterator[wire.Log]:
        """What has been written since the last time, now taken as sent."""
        for key, path in self._logs.items():
            if not path.exists():
                continue  # its process has not been started
            with open(path, "rb") as log:
                log.seek(self._sent[key])
                while text := log.read(1 << 20):
                    name = wire.RankName(role=key[0], rank=key[1])
                    yield wire.Log(name=name, offset=self._sent[key], text=text)
                    self._sent[key] += len(text)

    def beat(self, number: int) -> None:
        """Beat `number`, above those before, is sent now."""
        self._before_beats[number] = dict(self._sent)

    def answered(self, number: int) -> None:
        """The hub has heard beat `number`, and so all that was sent before."""
        if number in self._before_beats:
            self._arrived = self._before_beats[number]
            self._before_beats = {one: sent for one, sent in self._before_beats.items() if one > number}

    def go_back(self) -> None:
        """What has not surely arrived is unsent again."""
        self._sent = dict(self._arrived)
        self._before_beats.clear()
