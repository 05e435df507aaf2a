"""The Device, the Links between devices, and the Cluster they make. Imports no torch."""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.accelerators import Gpu, gpus, tpus
from meshwright.divisors import divisors
from meshwright.env import control_groups, instruction_level
from meshwright.errors import CannotWork, InputError, Problem, nearest_name

if TYPE_CHECKING:
    from meshwright.job.sections import ClusterSection

GIB = 1024**3
DEVICES_FILE = Path(__file__).with_name("devices.csv")
CPUINFO = Path("/proc/cpuinfo")

AMD = "AuthenticAMD"
#: Flops per cycle of one core: (vendor and family, flag, fp32, bf16); the first matching row counts, "" matches any.
#: AMD's fp32 is 32, as torch's products take the 256-bit path there; family 25 (Zen 4) halves its 512-bit instructions.
#: Without instructions for bf16 its products are emulated: measured 7 to 14 flops per cycle with AVX-512, and 1 to 9,
#: depending on how the operands lie, with AVX2.
CPU_FLOPS_PER_CYCLE: tuple[tuple[str, str, int, int], ...] = (
    (f"{AMD} 25", "avx512_bf16", 32, 64),
    (AMD, "avx512_bf16", 32, 128),
    (AMD, "avx512f", 32, 12),
    ("", "amx_bf16", 64, 1024),
    ("", "avx512_bf16", 64, 128),
    ("", "avx512f", 64, 12),
    ("", "avx2", 32, 4),
    ("", "", 8, 4),
)
#: The flags above from the weakest on, and how many of them oneDNN uses where it is limited to a level with this word.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_LEVELS = (("AMX", 4), ("BF16", 3), ("FP16", 3), ("AVX10", 3), ("AVX512", 2), ("AVX2", 1), ("AVX", 0), ("SSE41", 0))
CPU_MEMORY_BYTES_PER_SECOND = 30e9  # what one thread reads on servers of 2020 and later
CPU_LAUNCH_SECONDS = 6e-6  # eager dispatch of one operation, forward or backward
CUDA_LAUNCH_SECONDS = 6e-6
#: One hop of a message between two GPUs: nccl-tests' latency of all-reduce over 2, 4 and 8 (aiconfigurator's tables) by
#: the number of ranks; and between two nodes (ml-engineering's run on 4 nodes).
INTRA_LATENCY_SECONDS = 1.0e-6
INTER_LATENCY_SECONDS = 6.0e-6
GLOO_BYTES_PER_SECOND = 1.0e9
GLOO_LATENCY_SECONDS = 0.35e-3


@dataclass(frozen=True)
class Device:
    """One device: peak `flops` per second by precision ("fp32", "bf16", "fp16", "fp8", "fp4", without those it lacks),
    memory, and the time to start an operation.

    `kind` is "cpu" where host and device are one, else "cuda" for any maker. `real_flops` has the rates, by precision,
    measured for large matrix products, `real_memory_bytes_per_second` the memory's (0: not measured). `units` cores
    share the tiles of a product (0: not known, or less than one); `generation` names the architecture that kernels are
    built for ("sm90").
    """

    name: str
    kind: str
    memory_bytes: int
    flops: Mapping[str, float]
    memory_bytes_per_second: float
    launch_seconds: float
    real_flops: Mapping[str, float] = field(default_factory=dict)
    real_memory_bytes_per_second: float = 0.0
    units: int = 0
    generation: str = ""

    @property
    def slow_bf16(self) -> bool:
        """Whether this is a CPU that emulates products in bf16, at a fraction of the speed of fp32."""
        return self.kind == "cpu" and self.flops.get("bf16", 0.0) < self.flops["fp32"]

    def __post_init__(self) -> None:
        figures = {
            "memory_bytes": self.memory_bytes,
            "memory_bytes_per_second": self.memory_bytes_per_second,
            **{f"flops.{precision}": rate for precision, rate in self.flops.items()},
        }
        problems = [
            Problem(f"device {self.name}", f"{key} is {value:g}", "it must be above zero")
            for key, value in figures.items()
            if not value > 0
        ]
        if problems:
            raise InputError(problems)


@dataclass(frozen=True)
class Link:
    """A link between devices: bytes per second in one direction per device, and the latency of one message.

    `topology` is "switch" (any pair at full speed), "mesh" (a direct wire per pair), "ring", "pcie" (a shared tree) or
    "host" (memory of one machine). `peer_bytes_per_second` is the rate of one pair (0: the full rate). `switch_bus` is
    the measured bus bandwidth of all-reduce on such devices when the switch does the sums (0: no such switch),
    `measured_bus` that of this cluster, whatever does them (0: not measured).
    """

    name: str
    bytes_per_second: float
    latency_seconds: float
    topology: str = "switch"
    peer_bytes_per_second: float = 0.0
    switch_bus: float = 0.0
    measured_bus: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0:
            raise InputError(Problem(f"link {self.name}", "bandwidth is zero or negative", "give bytes per second > 0"))
        if self.latency_seconds < 0:
            raise InputError(Problem(f"link {self.name}", "latency is negative", "give seconds >= 0"))


@dataclass(frozen=True)
class Cluster:
    """`devices` equal devices, `devices_per_node` of them joined by `intra`, the nodes by `inter`.

    `assumed` lists, in words, every figure that was neither read nor given. `intra` may join more than a node: `joined`
    devices of a rack (0: those of a node).
    """

    device: Device
    devices: int
    devices_per_node: int
    intra: Link
    inter: Link
    dollars_per_hour: float | None = None  # of one device
    assumed: tuple[str, ...] = ()
    joined: int = 0

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise InputError(Problem("cluster.devices", f"{self.devices} devices", "give 1 or more"))
        if self.devices_per_node < 1:
            raise InputError(Problem("cluster.devices_per_node", f"{self.devices_per_node} devices", "give 1 or more"))
        if self.devices % self.devices_per_node:
            near = max(d for d in divisors(self.devices) if d <= self.devices_per_node)
            devices = -(-self.devices // self.devices_per_node) * self.devices_per_node
            raise InputError(
                Problem(
                    "cluster.devices_per_node",
                    f"{self.devices} devices are not a whole number of nodes of {self.devices_per_node}",
                    f"nearest: devices_per_node={near} or devices={devices}",
                )
            )

    @property
    def nodes(self) -> int:
        return self.devices // self.devices_per_node

    @cached_property
    def domain(self) -> int:
        """Adjacent devices that `intra` joins: those of a node, or of a rack whose nodes share a switch."""
        step = self.devices_per_node
        fits = [d for d in range(step, max(self.joined, step) + 1, step) if self.devices % d == 0]
        return fits[-1]

    def in_processes(self, count: int) -> Cluster:
        """The same CPU cores in `count` processes, a divisor of `devices`; each process gets the threads of
        devices / count."""
        device, times = self.device, self.devices // count
        cores = device.units * times
        merged = replace(
            device,
            name=f"process on {cores} CPU cores",
            memory_bytes=device.memory_bytes * times,
            flops={precision: rate * times for precision, rate in device.flops.items()},
            memory_bytes_per_second=device.memory_bytes_per_second * times,
            units=cores,
        )
        return replace(self, device=merged, devices=count, devices_per_node=count)

    def link(self, extent: int) -> Link:
        """The slowest link of a group whose ranks lie within `extent` adjacent ranks."""
        return self.intra if extent <= self.domain else self.inter

    def resolve_precision(self, word: str) -> str:
        """The precision for "auto": bf16 where it is at least 1.5 times as fast as fp32. Other words stay."""
        if word != "auto":
            return word
        return "bf16" if self.device.flops.get("bf16", 0.0) >= 1.5 * self.device.flops["fp32"] else "fp32"

    def __str__(self) -> str:
        nodes = f" in {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.devices} x {self.device.name}{nodes}"


def resolve_cluster(section: ClusterSection) -> Cluster:
    """The cluster of a job's section: a named device of the table, or this machine's GPUs, or this machine's cores.

    Raises InputError for an unknown name, counts below one, nodes that do not divide, more GPUs than there are.
    """
    if section.named is not None:
        return named_cluster(section.named, section.devices, section.devices_per_node)
    return this_machine(section.devices, section.devices_per_node)


def named_cluster(name: str, devices: int | None = None, devices_per_node: int | None = None) -> Cluster:
    """A cluster of a device of the table; `devices` defaults to one node of them."""
    table = _device_table()
    if name not in table:
        near = [known for known in table if name.lower() in known]
        hint = "nearest: " + ", ".join(near) if name and near else nearest_name(name, list(table))
        raise InputError(Problem("cluster.named", f"unknown device '{name}'", hint))
    return _table_cluster(table[name], devices, devices_per_node, ())


def device_names() -> tuple[str, ...]:
    """Names that `cluster.named` takes."""
    return tuple(_device_table())


def this_machine(devices: int | None = None, devices_per_node: int | None = None) -> Cluster:
    """This machine: its GPUs if it has any, else its CPU cores.

    Raises CannotWork for a machine of TPUs whose CPU cores are not asked for by `devices`.
    """
    if found := gpus():
        return _gpu_cluster(found, devices, devices_per_node)
    if devices is None and (refused := tpus()):
        what = f"this machine has {len(refused)} {refused[0]}, and torch's distributed training does not run on TPUs"
        known = ", ".join(name for name in device_names() if name.startswith("tpu"))
        hint = f"`plan` predicts them (cluster.named: {known}); cluster.devices=N takes N CPU cores instead"
        raise CannotWork(Problem("cluster.devices", what, hint))
    return cpu_cluster(devices, devices_per_node)


def cpu_cluster(devices: int | None = None, devices_per_node: int | None = None) -> Cluster:
    """This machine's CPU: one device is one process, by default one per core. With fewer processes than cores each has
    several threads, as `launch` starts them; with more they share cores. All share the memory."""
    cores = available_cores()
    count = cores if devices is None else devices
    assumed = [
        f"memory speed of a core: {CPU_MEMORY_BYTES_PER_SECOND / 1e9:g} GB/s",
        f"gloo between processes: {GLOO_BYTES_PER_SECOND / 1e9:g} GB/s",
    ]
    rates, assumed_core = _core_flops(*_cpuinfo())
    assumed.extend(assumed_core)
    threads = max(1, cores // max(count, 1))
    share = min(1.0, cores / max(count, 1))
    if share < 1.0:
        assumed.append(f"{count} processes share {cores} cores")
    speed = threads * share
    device = Device(
        name="CPU core" if threads == 1 else f"process on {threads} CPU cores",
        kind="cpu",
        memory_bytes=memory_bytes() // max(count, 1),
        flops={precision: rate * speed for precision, rate in rates.items()},
        memory_bytes_per_second=CPU_MEMORY_BYTES_PER_SECOND * speed,
        launch_seconds=CPU_LAUNCH_SECONDS / share,
        units=cores // max(count, 1),
    )
    link = Link("shared memory, gloo", GLOO_BYTES_PER_SECOND * share, GLOO_LATENCY_SECONDS / share, topology="host")
    per_node = count if devices_per_node is None else devices_per_node
    return Cluster(device, count, per_node, intra=link, inter=link, assumed=tuple(assumed))


def available_cores() -> int:
    """Cores that this process and those it starts may use: by its affinity, and by the quota of every control group
    that holds it, in whole cores."""
    cores = len(os.sched_getaffinity(0))
    for group in control_groups("cpu"):
        files = (group / "cpu.max",), (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
        for words in (" ".join(path.read_text() for path in paths).split() for paths in files if paths[0].exists()):
            if words[0] not in ("max", "-1"):
                cores = min(cores, max(1, int(words[0]) // int(words[1])))
    return cores


def memory_bytes() -> int:
    """Memory of this machine, or of a control group that holds this process where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(one.limit for one in _memory_limits())])


#: Of both versions of control groups: the files of the limit and of what is used, and the beginning of the lines in
#: memory.stat that count the groups below too.
MEMORY_FILES = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))


@dataclass(frozen=True)
class _MemoryLimit:
    """The limit of a control group, and the bytes of it that are left where its cached files are dropped."""

    limit: int
    available: int


def _memory_limits() -> Iterator[_MemoryLimit]:
    for group, (most, used, prefix) in itertools.product(control_groups("memory"), MEMORY_FILES):
        word = (group / most).read_text().strip() if (group / most).exists() else "max"
        if word != "max":
            stat = (group / "memory.stat").read_text()
            cached = re.findall(rf"^{prefix}(?:in)?active_file (\d+)", stat, re.MULTILINE)
            left = int(word) - int((group / used).read_text()) + sum(map(int, cached))
            yield _MemoryLimit(int(word), max(0, left))


def available_memory_bytes() -> int:
    """Memory that a new process may take without swapping: the least of the system's and the control groups'.

    All count cached pages of files as available, since these are dropped when memory is needed. All memory where the
    system does not say.
    """
    limits, system = [memory_bytes()], Path("/proc/meminfo")
    if system.exists():
        limits += [int(size) * 1024 for size in re.findall(r"MemAvailable:\s*(\d+)", system.read_text())]
    return min([*limits, *(one.available for one in _memory_limits())])


@cache
def _device_table() -> dict[str, dict[str, str]]:
    lines = [line for line in DEVICES_FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {row["name"]: row for row in csv.DictReader(lines)}


def _table_cluster(
    row: Mapping[str, str], devices: int | None, devices_per_node: int | None, assumed: tuple[str, ...]
) -> Cluster:
    usual = int(row["devices_per_node"])
    count = usual if devices is None else devices
    if devices_per_node is None:
        devices_per_node = max((d for d in range(1, usual + 1) if count > 0 and count % d == 0), default=1)
        if count > usual and devices_per_node != usual:
            assumed = (*assumed, f"{devices_per_node} devices per node, since {usual} do not divide {count}")
    device = _table_device(row)
    switch = _number(row["switch_gbps"]) * 1e9
    peer = _number(row["peer_gbps"]) * 1e9
    rate = float(row["intra_gbps"]) * 1e9
    intra = Link(row["intra_name"], rate, INTRA_LATENCY_SECONDS, row["topology"], peer, switch)
    inter = Link(row["inter_name"], float(row["inter_gbps"]) * 1e9, INTER_LATENCY_SECONDS)
    if count > devices_per_node:
        assumed = (*assumed, f"network between nodes: {float(row['inter_gbps']) * 8:g} Gbit/s per device")
    joined = int(_number(row["joined"]))
    return Cluster(device, count, devices_per_node, intra, inter, assumed=assumed, joined=joined)


def _table_device(row: Mapping[str, str]) -> Device:
    rates = {key: _number(row[f"{key}_tflops"]) * 1e12 for key in ("fp32", "bf16", "fp16", "fp8", "fp4")}
    real = {"bf16": _number(row["real_matmul_tflops"]) * 1e12, "fp8": _number(row["real_fp8_tflops"]) * 1e12}
    if rates["fp16"] == rates["bf16"]:
        real["fp16"] = real["bf16"]
    return Device(
        name=row["name"],
        kind="cuda",
        memory_bytes=int(float(row["memory_gib"]) * GIB),
        flops={key: rate for key, rate in rates.items() if rate},
        memory_bytes_per_second=float(row["memory_gbps"]) * 1e9,
        launch_seconds=CUDA_LAUNCH_SECONDS,
        real_flops={key: rate for key, rate in real.items() if rate},
        real_memory_bytes_per_second=_number(row["real_memory_gbps"]) * 1e9,
        units=int(_number(row["units"])),
        generation=row["generation"],
    )


def _number(text: str) -> float:
    """A figure of the table; 0 where it is not given."""
    return float(text) if text else 0.0


def _gpu_cluster(gpus: Sequence[Gpu], devices: int | None, devices_per_node: int | None) -> Cluster:
    if devices is not None and devices > len(gpus):
        raise InputError(
            Problem(
                "cluster.devices",
                f"{devices} devices asked for, this machine has {len(gpus)} GPUs",
                f"devices={len(gpus)}, or name a device to plan for: cluster.named=h100-sxm-80gb",
            )
        )
    name, memory_bytes = gpus[0].name, gpus[0].memory_bytes
    count = len(gpus) if devices is None else devices
    table = _device_table()
    rows = [row for row in table.values() if re.search(row["pattern"], name)]
    assumed: tuple[str, ...] = ()
    if not rows:  # no figures for this GPU: take the row nearest in memory
        near = min(table.values(), key=lambda row: abs(float(row["memory_gib"]) * GIB - memory_bytes))
        rows = [{**near, "name": name}]
        assumed = (f"'{name}' is not in the table of devices: speeds of {near['name']}",)
    if others := sorted({gpu.name for gpu in gpus} - {name}):
        assumed = (*assumed, f"all GPUs are '{name}', though there are {', '.join(others)} too")
    row = {**rows[0], "memory_gib": str(min(gpu.memory_bytes for gpu in gpus) / GIB)}
    return _table_cluster(row, count, count if devices_per_node is None else devices_per_node, assumed)


def _cpuinfo() -> tuple[str, frozenset[str], float | None]:
    """("vendor family", flags, MHz) of the first core, empty or None where the system does not say. Flags are left out
    where the environment forbids their instructions to oneDNN, which computes the products in bf16."""
    fields: dict[str, str] = {}
    if CPUINFO.exists():
        for line in CPUINFO.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    megahertz = float(fields["cpu MHz"]) if "cpu MHz" in fields else None
    maker = f"{fields.get('vendor_id', '')} {fields.get('cpu family', '')}".strip()
    used = next((count for word, count in _LEVELS if word in instruction_level()), len(_FLAGS))
    return maker, frozenset(fields.get("flags", "").split()).difference(_FLAGS[used:]), megahertz


def _core_flops(maker: str, flags: frozenset[str], megahertz: float | None) -> tuple[dict[str, float], list[str]]:
    """Peak flops per second of one core by precision, and what was assumed."""
    assumed = []
    if megahertz is None:
        megahertz = 2500.0
        assumed.append("clock of a core: 2.5 GHz")
    if not flags:
        flags = frozenset({"avx2"})
        assumed.append("instructions of a core: 256-bit vectors")
    fp32, bf16 = next(
        (a, b) for who, flag, a, b in CPU_FLOPS_PER_CYCLE if maker.startswith(who) and (not flag or flag in flags)
    )
    return {"fp32": fp32 * megahertz * 1e6, "bf16": bf16 * megahertz * 1e6}, assumed
