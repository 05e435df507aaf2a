"""GPUs and TPUs that are not in this machine: programs that print what the makers' own print, and a bus of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright import accelerators
from meshwright.accelerators import MIB, Gpu, gpus, tpus
from meshwright.cluster import this_machine

AMD_SMI = """WARNING: User is missing the following required groups: render
{"gpu_data": [
 {"gpu": 0, "asic": {"market_name": "AMD Instinct MI300X", "vendor_id": "0x1002", "num_compute_units": 304,
  "target_graphics_version": "gfx942"}, "vram": {"type": "HBM3", "size": {"value": 196592, "unit": "MB"}}},
 {"gpu": 1, "asic": {"market_name": "AMD Instinct MI300X", "vendor_id": "0x1002", "num_compute_units": 304,
  "target_graphics_version": "gfx942"}, "vram": {"type": "HBM3", "size": {"value": 196592, "unit": "MB"}}}]}
"""
ROCM_SMI = """{"card0": {"VRAM Total Memory (B)": "206141652992", "VRAM Total Used Memory (B)": "297791488",
 "Card Series": "AMD Instinct MI325X", "Card Model": "0x74a5", "GFX Version": "gfx942"},
 "system": {"Driver version": "6.10.5"}}
"""
XPU_SMI = """Device Name,Memory Physical Size
"Intel(R) Data Center GPU Max 1550","131072.00 MiB"
"Intel(R) Data Center GPU Max 1550","131072.00 MiB"
"""
NVIDIA_SMI = "NVIDIA H100 80GB HBM3, 81559\n"


def program(folder: Path, name: str, prints: str, code: int = 0) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{prints}END\nexit {code}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which programs are found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "prints", "found"),
    [
        ("nvidia-smi", NVIDIA_SMI, [Gpu("NVIDIA H100 80GB HBM3", 81559 * MIB, "CUDA")]),
        ("amd-smi", AMD_SMI, [Gpu("AMD Instinct MI300X", 196592 * MIB, "ROCm")] * 2),
        ("rocm-smi", ROCM_SMI, [Gpu("AMD Instinct MI325X", 206141652992, "ROCm")]),
        ("xpu-smi", XPU_SMI, [Gpu("Intel(R) Data Center GPU Max 1550", 131072 * MIB, "XPU")] * 2),
    ],
)
def test_each_makers_program_lists_its_gpus(programs: Path, name: str, prints: str, found: list[Gpu]) -> None:
    program(programs, name, prints)
    assert list(gpus()) == found


def test_the_list_of_amd_smi_needs_no_wrapping(programs: Path) -> None:
    one = '{"asic": {"market_name": "AMD Instinct MI355X"}, "vram": {"size": {"value": 294896, "unit": "MB"}}}\n'
    for printed in (one, f"[{one}]\n"):
        program(programs, "amd-smi", printed)
        assert gpus() == (Gpu("AMD Instinct MI355X", 294896 * MIB, "ROCm"),)


def test_a_program_that_finds_nothing_leaves_it_to_the_next(programs: Path) -> None:
    program(programs, "nvidia-smi", "NVIDIA-SMI has failed because it couldn't communicate with the driver.\n", code=9)
    program(programs, "amd-smi", "[]\n")
    program(programs, "xpu-smi", "No device discovered\n", code=1)
    assert gpus() == ()
    program(programs, "rocm-smi", ROCM_SMI)
    assert [gpu.name for gpu in gpus()] == ["AMD Instinct MI325X"]


def test_a_machine_of_amds_gpus_is_planned_by_its_row_of_the_table(programs: Path) -> None:
    program(programs, "amd-smi", AMD_SMI)
    found = this_machine()
    assert (found.device.name, found.devices, found.device.memory_bytes) == ("mi300x", 2, 196592 * MIB)
    assert not found.assumed


def test_a_gpu_without_a_row_is_planned_by_the_nearest_and_says_so(programs: Path) -> None:
    program(programs, "xpu-smi", XPU_SMI)
    assert any("'Intel(R) Data Center GPU Max 1550' is not in the table" in said for said in this_machine().assumed)


def test_tpus_are_found_on_the_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (vendor, device) in enumerate([("0x8086", "0x0063"), ("0x1ae0", "0x0042"), ("0x1ae0", "0x0063")]):
        card = tmp_path / f"0000:00:0{number}.0"
        card.mkdir()
        (card / "vendor").write_text(f"{vendor}\n")
        (card / "device").write_text(f"{device}\n")
    monkeypatch.setattr(accelerators, "PCI", tmp_path)
    assert tpus() == ("tpu-v5e",)
