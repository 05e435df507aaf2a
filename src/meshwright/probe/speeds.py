"""The speeds of this machine that matter for training, measured in a few seconds: `measure() -> Speeds`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from meshwright.cluster import available_cores
from meshwright.errors import MeshwrightError, Problem
from meshwright.probe.links import LinkSpeed, measure_links

MIB = 1024**2
#: (rows, inner, columns) of the products: those of a block 512 wide, and a square one that suits any device.
SHAPES_CPU = ((512, 512, 512), (2048, 512, 1408), (1024, 1024, 1024))
SHAPES_CUDA = ((4096, 1024, 1024), (8192, 4096, 4096), (8192, 8192, 8192))


@dataclass(frozen=True)
class ProductSpeed:
    """A matrix product: `rows` x `inner` by `inner` x `columns` in `precision`, on one device of `threads` threads."""

    device: str
    precision: str
    rows: int
    inner: int
    columns: int
    threads: int
    flops_per_second: float


@dataclass(frozen=True)
class Speeds:
    """The results. Rates are the best of several tries, since other work on the machine can only lower them.

    `memory_read_bytes_per_second`: by number of CPU threads ({1: ..., 2: ...}); key 0 is a GPU's own memory.
    `host_link_bytes_per_second`: from host memory to the first GPU, None without a GPU.
    `disk_write_bytes_per_second`: a file written and synced in the folder for temporary files.
    `problems`: what could not be measured, and why.
    """

    products: tuple[ProductSpeed, ...]
    memory_read_bytes_per_second: dict[int, float]
    links: tuple[LinkSpeed, ...]
    host_link_bytes_per_second: float | None
    disk_write_bytes_per_second: float
    seconds: float
    problems: tuple[Problem, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; the keys of `memory_read_bytes_per_second` become text."""
        fields = asdict(self)
        fields["memory_read_bytes_per_second"] = {str(k): v for k, v in self.memory_read_bytes_per_second.items()}
        return fields


def measure(seconds_each: float = 0.12, processes: int = 2, interface: str = "lo") -> Speeds:
    """Time this machine's devices, memory, links and disk. Takes about 40 x `seconds_each` and a process start.

    `processes` is the number of processes for the links, on `interface`; 0 leaves the links out.
    """
    start = time.perf_counter()
    cuda = torch.cuda.is_available()
    problems: list[Problem] = []
    products = list(_products("cpu", SHAPES_CPU, seconds_each))
    memory = _memory_read(seconds_each)
    host_link = None
    if cuda:
        products += _products("cuda", SHAPES_CUDA, seconds_each)
        memory[0] = _cuda_memory_read(seconds_each)
        host_link = _host_link(seconds_each)
    links: tuple[LinkSpeed, ...] = ()
    if processes:
        try:
            links = measure_links(processes, interface)
        except MeshwrightError as error:
            problems.extend(error.problems)
    disk = _disk_write()
    seconds = time.perf_counter() - start
    return Speeds(tuple(products), memory, links, host_link, disk, seconds, tuple(problems))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _thread_counts() -> list[int]:
    return sorted({1, available_cores()})


def best_seconds(work: Callable[[], Any], budget_seconds: float, sync: Callable[[], Any] = lambda: None) -> float:
    """Shortest time of `work`, repeated for about `budget_seconds` after one warm-up, at least three times.

    `sync` waits for the device, and counts.
    """
    work()
    sync()
    best, spent, tries = float("inf"), 0.0, 0
    while tries < 3 or spent < budget_seconds:
        start = time.perf_counter()
        work()
        sync()
        seconds = time.perf_counter() - start
        best, spent, tries = min(best, seconds), spent + seconds, tries + 1
    return best


def _products(device: str, shapes: tuple[tuple[int, int, int], ...], seconds_each: float) -> Iterator[ProductSpeed]:
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for threads in _thread_counts() if device == "cpu" else [1]:
        with _threads(threads):
            for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                for rows, inner, columns in shapes:
                    left = torch.randn(rows, inner, device=device).to(dtype)
                    right = torch.randn(inner, columns, device=device).to(dtype)
                    out = torch.empty(rows, columns, device=device, dtype=dtype)

                    def work(left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out) -> None:
                        torch.mm(left, right, out=out)

                    seconds = best_seconds(work, seconds_each, sync)
                    rate = 2 * rows * inner * columns / seconds
                    yield ProductSpeed(device, precision, rows, inner, columns, threads, rate)


def _memory_read(seconds_each: float, mebibytes: int = 256) -> dict[int, float]:
    """Bytes per second read by a sum over more memory than the caches hold, by number of threads."""
    data = torch.ones(mebibytes * MIB // 4)
    rates = {}
    for threads in _thread_counts():
        with _threads(threads):
            rates[threads] = mebibytes * MIB / best_seconds(data.sum, seconds_each)
    return rates


def _cuda_memory_read(seconds_each: float, mebibytes: int = 1024) -> float:
    data = torch.ones(mebibytes * MIB // 4, device="cuda")
    return mebibytes * MIB / best_seconds(data.sum, seconds_each, torch.cuda.synchronize)


def _host_link(seconds_each: float, mebibytes: int = 128) -> float:
    host = torch.empty(mebibytes * MIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    copy = lambda: device.copy_(host, non_blocking=True)  # noqa: E731 - one expression, used once
    return mebibytes * MIB / best_seconds(copy, seconds_each, torch.cuda.synchronize)


def _disk_write(mebibytes: int = 48) -> float:
    """Bytes per second of writing and syncing a temporary file."""
    block = os.urandom(MIB)
    with tempfile.TemporaryDirectory(prefix="meshwright-probe-") as folder:
        start = time.perf_counter()
        with open(Path(folder) / "block", "wb") as file:
            for _ in range(mebibytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return mebibytes * MIB / (time.perf_counter() - start)
