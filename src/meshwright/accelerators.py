"""What computes in this machine beside its CPU, by the programs of the makers and by the bus. Imports no torch.

None of these programs was run by us on a device: they are read by what their makers and users show of them.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1024**2
PROGRAM_SECONDS = 20
PCI = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"
#: Google's PCI device ids (jax, hardware_utils.py), by the names that the table of devices gives; 2 and 3 share one.
TPUS = {"0x0027": "tpu-v3", "0x005e": "tpu-v4", "0x0062": "tpu-v5p", "0x0063": "tpu-v5e", "0x006f": "tpu-v6e"}


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker's program names it; `build` is the build of torch that uses it."""

    name: str
    memory_bytes: int
    build: str


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that the first program of PROGRAMS lists that lists any."""
    for words, build, read in PROGRAMS:
        if found := tuple(Gpu(name, memory_bytes, build) for name, memory_bytes in read(_printed(words))):
            return found
    return ()


def tpus() -> tuple[str, ...]:
    """The TPUs on this machine's bus, a name each."""
    found = []
    for vendor in sorted(PCI.glob("*/vendor")):
        if vendor.read_text().strip() == GOOGLE:
            found.append(TPUS.get(vendor.with_name("device").read_text().strip(), ""))
    return tuple(filter(None, found))


def _printed(words: tuple[str, ...]) -> str:
    """What a program prints; "" where it is not there, fails or does not end."""
    program = shutil.which(words[0])
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *words[1:]], capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _nvidia(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        name, comma, mebibytes = line.rpartition(",")
        if comma:
            yield name.strip(), int(float(mebibytes)) * MIB


def _amd(text: str) -> Iterator[tuple[str, int]]:
    """amd-smi of ROCm 6.4 and later wraps its list in "gpu_data"; what it calls MB are MiB."""
    answer = _json(text)
    rows = answer.get("gpu_data", [answer]) if isinstance(answer, dict) else answer or []
    for row in rows:
        yield row["asic"]["market_name"], int(row["vram"]["size"]["value"]) * MIB


def _rocm(text: str) -> Iterator[tuple[str, int]]:
    for key, row in (_json(text) or {}).items():
        if key.startswith("card"):
            yield row.get("Card Series") or row["Card series"], int(row["VRAM Total Memory (B)"])


def _intel(text: str) -> Iterator[tuple[str, int]]:
    for row in csv.DictReader(text.splitlines(), skipinitialspace=True):
        if size := re.match(r"[\d.]+", row["Memory Physical Size"]):
            yield row["Device Name"], int(float(size[0]) * MIB)


def _json(text: str) -> Any:
    """The JSON after the warnings that these programs print before it; None where there is none."""
    start = re.search(r"^[\[{]", text, re.MULTILINE)
    return json.loads(text[start.start() :]) if start else None


Reader = Callable[[str], Iterator[tuple[str, int]]]
#: Each program with its words, the build of torch for its devices, and what reads it.
PROGRAMS: tuple[tuple[tuple[str, ...], str, Reader], ...] = (
    (("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"), "CUDA", _nvidia),
    (("amd-smi", "static", "--asic", "--vram", "--json"), "ROCm", _amd),
    (("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json"), "ROCm", _rocm),
    (("xpu-smi", "discovery", "--dump", "2,16"), "XPU", _intel),
)
