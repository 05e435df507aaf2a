"""The cluster: this machine, named devices, and what cannot be one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshwright import cluster, env
from meshwright.accelerators import Gpu
from meshwright.cluster import Cluster, Device, Link, cpu_cluster, named_cluster, resolve_cluster
from meshwright.errors import CannotWork, InputError


@dataclass(frozen=True)
class Wish:
    devices: int | None = None
    devices_per_node: int | None = None
    named: str | None = None


def device(**changes: object) -> Device:
    values = {
        "name": "d",
        "kind": "cuda",
        "memory_bytes": 10,
        "flops": {"fp32": 1.0, "bf16": 2.0},
        "memory_bytes_per_second": 1.0,
        "launch_seconds": 0.0,
    }
    return Device(**{**values, **changes})  # type: ignore[arg-type]


LINK = Link("wire", 1e9, 1e-6)


def control_groups(monkeypatch: pytest.MonkeyPatch, folder: Path, *own: str) -> None:
    """Let `folder` be what Linux shows of control groups; this process is in the groups that `own` names."""
    folder.mkdir(exist_ok=True)
    (folder / "own").write_text("\n".join(own))
    monkeypatch.setattr(env, "CGROUPS", folder)
    monkeypatch.setattr(env, "OWN_CGROUPS", folder / "own")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_this_machine_without_gpus_is_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "gpus", tuple)
    monkeypatch.setattr(cluster, "available_cores", lambda: 3)
    found = resolve_cluster(Wish())
    assert (found.devices, found.devices_per_node, found.device.kind) == (3, 3, "cpu")
    assert found.device.flops["fp32"] > 0


def test_more_processes_than_cores_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "available_cores", lambda: 2)
    two, eight = cpu_cluster(2), cpu_cluster(8)
    assert eight.device.flops["fp32"] == pytest.approx(two.device.flops["fp32"] / 4)
    assert eight.device.memory_bytes == pytest.approx(two.device.memory_bytes / 4)
    assert any("8 processes share 2 cores" in said for said in eight.assumed)


def test_fewer_processes_than_cores_have_several_threads_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "available_cores", lambda: 4)
    one, four = cpu_cluster(1), cpu_cluster(4)
    assert one.device.flops["fp32"] == pytest.approx(4 * four.device.flops["fp32"])
    assert "4 CPU cores" in str(one)


def test_gpus_of_this_machine_take_the_rates_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "gpus", lambda: [Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, "CUDA")] * 4)
    found = resolve_cluster(Wish())
    assert (found.devices, found.device.kind, found.device.memory_bytes) == (4, "cuda", 80 * 2**30)
    assert found.device.flops["bf16"] == 989e12
    with pytest.raises(InputError, match="devices=4"):
        resolve_cluster(Wish(devices=5))


@pytest.mark.parametrize(
    ("printed", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", "b200-sxm"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B300 SXM6 AC", "b300-sxm"),
        ("NVIDIA GB300", "gb300"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-32GB", "v100-sxm-32gb"),
        ("Tesla T4", "t4"),
    ],
)
def test_what_nvidia_smi_prints_is_one_row_or_none(monkeypatch: pytest.MonkeyPatch, printed: str, row: str) -> None:
    rows = [name for name, known in cluster._device_table().items() if re.search(known["pattern"], printed)]
    assert rows == ([row] if row else [])
    monkeypatch.setattr(cluster, "gpus", lambda: [Gpu(printed, 80 * 2**30, "CUDA")])
    assert resolve_cluster(Wish()).device.name == (row or printed)


def test_a_box_of_different_gpus_is_planned_as_the_first_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = [Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, "CUDA"), Gpu("NVIDIA A100-SXM4-40GB", 40 * 2**30, "CUDA")]
    monkeypatch.setattr(cluster, "gpus", lambda: boards)
    found = resolve_cluster(Wish())
    assert found.device.memory_bytes == 40 * 2**30
    assert any("though there are NVIDIA A100-SXM4-40GB too" in said for said in found.assumed)


def test_an_unknown_gpu_is_planned_for_with_the_nearest_row_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "gpus", lambda: [Gpu("NVIDIA Imaginary 9000", 81 * 10**9, "CUDA")])
    assert any("Imaginary" in said for said in resolve_cluster(Wish()).assumed)


def test_a_machine_of_tpus_is_refused_by_name_and_its_cores_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "gpus", tuple)
    monkeypatch.setattr(cluster, "tpus", lambda: ("tpu-v5e",) * 4)
    with pytest.raises(CannotWork, match=r"4 tpu-v5e.*plan.*cluster.named: tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e"):
        resolve_cluster(Wish())
    assert resolve_cluster(Wish(devices=2)).device.kind == "cpu"
    assert resolve_cluster(Wish(named="tpu-v5e")).device.generation == "tpu"


def test_a_named_device_is_one_node_unless_told() -> None:
    assert resolve_cluster(Wish(named="h100-sxm-80gb")).devices == 8
    many = resolve_cluster(Wish(named="h100-sxm-80gb", devices=64))
    assert (many.nodes, many.devices_per_node) == (8, 8)
    assert many.link(8) == many.intra and many.link(9) == many.inter


@pytest.mark.parametrize(("name", "near"), [("h100", "h100-sxm-80gb"), ("h100-smx-80gb", "h100-sxm-80gb")])
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match=near):
        named_cluster(name)


def test_every_row_of_the_table_makes_a_cluster() -> None:
    for name in cluster.device_names():
        assert named_cluster(name).device.name == name


@pytest.mark.parametrize("devices", [0, -1])
def test_no_devices_is_bad_input(devices: int) -> None:
    with pytest.raises(InputError, match="give 1 or more"):
        named_cluster("l4", devices)
    with pytest.raises(InputError, match="give 1 or more"):
        cpu_cluster(devices)


def test_nodes_must_divide_the_devices() -> None:
    with pytest.raises(InputError, match="devices_per_node=6 or devices=16"):
        Cluster(device(), 12, 8, LINK, LINK)


def test_zero_bandwidth_and_memory_are_bad_input() -> None:
    with pytest.raises(InputError, match="bandwidth"):
        Link("dead", 0.0, 1e-6)
    with pytest.raises(InputError, match="memory_bytes_per_second is 0"):
        device(memory_bytes_per_second=0.0)
    with pytest.raises(InputError, match=r"flops\.bf16"):
        device(flops={"fp32": 1.0, "bf16": -1.0})


def test_auto_precision_follows_the_device() -> None:
    fast = Cluster(device(), 1, 1, LINK, LINK)
    slow = Cluster(device(flops={"fp32": 2.0, "bf16": 1.0}), 1, 1, LINK, LINK)
    assert fast.resolve_precision("auto") == "bf16"
    assert slow.resolve_precision("auto") == "fp32"
    assert slow.resolve_precision("bf16") == "bf16"


@pytest.mark.parametrize(
    ("maker", "flags", "fp32", "bf16"),
    [
        ("AuthenticAMD 25", {"avx2", "avx512f", "avx512_bf16"}, 32, 64),
        ("AuthenticAMD 26", {"avx2", "avx512f", "avx512_bf16"}, 32, 128),
        ("AuthenticAMD 25", {"avx2"}, 32, 4),
        ("GenuineIntel 6", {"avx2", "avx512f", "avx512_bf16"}, 64, 128),
        ("GenuineIntel 6", {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, 64, 1024),
        ("GenuineIntel 6", {"avx2", "avx512f"}, 64, 12),
        ("GenuineIntel 6", {"avx2"}, 32, 4),
        ("", set(), 32, 4),
    ],
)
def test_rates_of_a_core_follow_its_instructions(maker: str, flags: set[str], fp32: int, bf16: int) -> None:
    rates, _ = cluster._core_flops(maker, frozenset(flags), 1000.0)
    assert rates == {"fp32": fp32 * 1e9, "bf16": bf16 * 1e9}


@pytest.mark.parametrize(
    ("level", "fast"),
    [
        ("", True),
        ("AVX512_CORE_AMX", True),
        ("avx512_core_bf16", True),
        ("AVX512_CORE_VNNI", False),
        ("AVX2_VNNI_2", False),
        ("SSE41", False),
    ],
)
def test_instructions_that_onednn_may_not_use_do_not_count(
    level: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "fpu avx2 avx512f avx512_bf16 amx_bf16"
    write(tmp_path / "cpuinfo", f"vendor_id\t: GenuineIntel\ncpu family\t: 6\nflags\t\t: {flags}\n\nvendor_id\t: x\n")
    monkeypatch.setattr(cluster, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)
    machine = cpu_cluster(1)
    assert machine.device.slow_bf16 is not fast
    assert machine.resolve_precision("auto") == ("bf16" if fast else "fp32")


def test_every_device_of_the_table_has_figures_that_make_sense() -> None:
    for name in cluster.device_names():
        found = named_cluster(name).device
        for precision, rate in found.real_flops.items():
            assert 0.4 * found.flops[precision] < rate <= found.flops[precision], (name, precision)
        assert found.real_memory_bytes_per_second <= found.memory_bytes_per_second
        assert found.flops.get("fp8", found.flops["fp32"]) >= found.flops["fp32"] * 0.5
        assert found.generation


def test_a_device_lists_only_precisions_that_it_has() -> None:
    assert "bf16" not in named_cluster("v100-sxm-32gb").device.flops
    assert "fp8" not in named_cluster("a100-sxm-80gb").device.flops
    assert {"fp8", "fp4"} <= set(named_cluster("b200-sxm").device.flops)
    assert named_cluster("t4").resolve_precision("auto") == "fp32"


def test_a_rack_joins_nodes_by_the_inner_link() -> None:
    rack = named_cluster("gb200", 128, 4)
    assert (rack.nodes, rack.domain) == (32, 64)
    assert rack.link(64) is rack.intra and rack.link(65) is rack.inter
    assert named_cluster("h100-sxm-80gb", 64).domain == 8


def test_memory_counts_the_container_and_its_cached_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups(monkeypatch, tmp_path, "0::/")
    assert 0 < cluster.available_memory_bytes() <= cluster.memory_bytes()
    (tmp_path / "memory.max").write_text("9000000\n")
    (tmp_path / "memory.current").write_text("7000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 9\ninactive_file 2000000\nactive_file 500000\nslab 3\n")
    assert (cluster.memory_bytes(), cluster.available_memory_bytes()) == (9_000_000, 4_500_000)
    (tmp_path / "memory.current").write_text("12000000\n")
    assert cluster.available_memory_bytes() == 0


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        (["0::/"], {}, 64),
        (["0::/"], {"cpu.max": "max 100000"}, 64),
        (["0::/"], {"cpu.max": "250000 100000"}, 2),  # docker --cpus=2.5
        (["0::/"], {"cpu.max": "50000 100000"}, 1),
        (["0::/"], {"cpu.max": "9900000 100000"}, 64),
        (["0::/docker/4711"], {"cpu.max": "200000 100000"}, 2),  # the path is the host's, the mount the container's
        (["0::/a.slice/b.service"], {"a.slice/cpu.max": "300000 100000", "a.slice/b.service/cpu.max": "max 1"}, 3),
        (["3:cpu,cpuacct:/b", "0::/"], {"cpu/b/cpu.cfs_quota_us": "200000", "cpu/b/cpu.cfs_period_us": "50000"}, 4),
        (["3:cpu,cpuacct:/b", "0::/"], {"cpu/b/cpu.cfs_quota_us": "-1", "cpu/b/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_cores_are_those_of_affinity_and_of_every_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: list[str], files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    control_groups(monkeypatch, tmp_path, *own)
    for name, text in files.items():
        write(tmp_path / name, text + "\n")
    assert cluster.available_cores() == cores
    assert cpu_cluster(2).device.units == cores // 2


def test_memory_counts_control_groups_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups(monkeypatch, tmp_path, "9:memory:/docker/4711", "0::/")
    texts = {
        "limit_in_bytes": "9000000",
        "usage_in_bytes": "7000000",
        "stat": "cache 1\ninactive_file 5\nactive_file 5\ntotal_inactive_file 2000000\ntotal_active_file 500000",
    }
    for name, text in texts.items():
        write(tmp_path / "memory" / f"memory.{name}", text + "\n")
    assert (cluster.memory_bytes(), cluster.available_memory_bytes()) == (9_000_000, 4_500_000)
    write(tmp_path / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")  # no limit
    assert cluster.memory_bytes() > 9_000_000


def test_memory_counts_the_groups_above_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups(monkeypatch, tmp_path, "0::/a.slice/b.service")
    write(tmp_path / "a.slice/b.service/memory.max", "max\n")
    for name, text in {"memory.max": "8000000", "memory.current": "3000000", "memory.stat": "anon 3000000"}.items():
        write(tmp_path / "a.slice" / name, text + "\n")
    assert (cluster.memory_bytes(), cluster.available_memory_bytes()) == (8_000_000, 5_000_000)
