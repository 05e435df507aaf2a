"""The driver's disk as ranks without it reach it, beside the disk itself: megabytes a second, and seconds of many rows.

python bench/speed/hub_disk.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from meshwright.disk import OWN_DISK, Disk
from meshwright.launch import Context
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.messages import Dial, RankPlace
from meshwright.run import RunFolder

ROUNDS = 5
FILE_BYTES = 256 << 20
#: Rows of a weight that is split by columns: each goes to a place of its own.
ROWS, ROW_BYTES = 20_000, 4096


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def measure(disk: Disk, path: Path) -> Iterator[float]:
    data = memoryview(bytes(FILE_BYTES))
    disk.write(path, b"")
    write = [seconds(lambda: disk.write_at(path, [(0, data)])) for _ in range(ROUNDS)]
    rows = [(number * 2 * ROW_BYTES, data[:ROW_BYTES]) for number in range(ROWS)]
    scattered = [seconds(lambda: disk.write_at(path, rows)) for _ in range(ROUNDS)]
    read = [seconds(lambda: disk.read(path, FILE_BYTES)) for _ in range(ROUNDS)]
    yield FILE_BYTES / 1e6 / statistics.median(write)
    yield statistics.median(scattered)
    yield FILE_BYTES / 1e6 / statistics.median(read)


def main() -> None:
    print("| disk | write, MB/s | 20,000 rows of 4 KiB, s | read, MB/s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        run = RunFolder(folder)
        files = HubFiles(run.hub, ["127.0.0.1:0"])
        assert files.network is not None
        generation = run.grant_lease()
        files.begin(generation, [], [], run.logs)

        def through(dial: Dial) -> Disk:
            place = RankPlace("rank", 0, 1, 0, 0, generation, run.logs, dial, "node", folder)
            disk = Context(place).hub_disk(run.path)
            assert disk is not None
            return disk

        disks = {"its own": OWN_DISK, "by the hub": through(files.network)}
        for name, disk in disks.items():
            write, scattered, read = measure(disk, run.lease(generation) / "file")
            print(f"| {name} | {write:.0f} | {scattered:.2f} | {read:.0f} |")
        files.close()


if __name__ == "__main__":
    main()
