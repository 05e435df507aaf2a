"""The constants of training on GPUs: each with its value, unit and source. None was fitted to step times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """One number of the model. `prior` is the standard deviation of its logarithm that we believe in, which bounds how
    far a fit moves it; a fit leaves a constant with prior 0 alone. `positive`: zero is not allowed."""

    name: str
    value: float
    unit: str
    what: str
    source: str
    prior: float = 0.0
    positive: bool = True


_MAMF = "ml-engineering, maximum achievable matmul flops; Azure AI benchmarking guide, cuBLASLt"
_POWER = "He 2024, products of random numbers at the power limit; by the power that data sheets allow a flop"
_STREAM = "Azure AI benchmarking guide: BabelStream copy and triad over the data sheet"
_NCCL = "aiconfigurator: nccl-tests on one node of A100, H100 and B200, 512 B to 512 MB"
_READ = "TokenWindows.take timed on an EPYC core, 5 to 14 ns; 24 bytes over PCIe 4"
GUESS = "assumed: by its order of magnitude"
JOINED = "assumed: between their sum, 1, and the larger, infinity"
_EAGER = "eager GPT block of tiny tensors timed on an EPYC core, 4 us of CUDA's launch added to each kernel"

CONSTANTS: tuple[Constant, ...] = (
    # products of matrices
    Constant("cuda.product.share", 0.94, "share", "of the measured ceiling that large products reach", _MAMF, 0.07),
    Constant("cuda.product.unmeasured", 0.80, "share", "of the peak, where no ceiling was measured", _MAMF, 0.15),
    Constant("cuda.product.sustained.sm80", 1.0, "share", "of that ceiling at the power limit, A100", _POWER, 0.05),
    Constant("cuda.product.sustained.sm90", 0.90, "share", "of that ceiling at the power limit, H100", _POWER, 0.1),
    Constant("cuda.product.sustained.sm100", 0.80, "share", "of that ceiling at the power limit, B200", _POWER, 0.15),
    Constant("cuda.product.sustained.sm103", 0.90, "share", "of that ceiling at the power limit, B300", _POWER, 0.15),
    Constant("cuda.product.start_seconds", 3e-6, "s", "before a product is at full speed", _MAMF, 0.5),
    Constant("cuda.product.inner", 64.0, "elements", "inner size at which half of the speed is lost", _MAMF, 0.5),
    Constant("cuda.product.waves", 0.6, "exponent", "loss in a partly filled last wave of tiles", _MAMF, 0.3),
    Constant("cuda.product.wide", 1.0, "share", "of a product's speed in the undivided output head", "none lost", 0.4),
    Constant("cuda.cast.bytes", 5.0, "bytes", "moved to quantize one element for fp8", "read 2, write 1 twice", 0.4),
    # attention
    Constant("cuda.attention.share", 1.0, "share", "of the kernels' published speed", "FLASH_SHARE's sources", 0.2),
    Constant(
        "cuda.attention.half_seq", 600.0, "tokens", "length at half speed", "FlashAttention-2, figures 4 to 7", 0.4
    ),
    Constant("cuda.attention.backward", 3.0, "forwards", "2.5 times the flops, 0.83 the rate", "FlashAttention-2", 0.2),
    Constant(
        "cuda.attention.unfused", 0.45, "share", "of a product's speed in unfused attention", "inner size 64", 0.3
    ),
    Constant("cuda.attention.passes", 6.5, "passes", "over the scores, forward, unfused", "Megatron's kernels", 0.3),
    # memory-bound operations
    Constant("cuda.memory.share", 0.85, "share", "of the data sheet's memory speed", _STREAM, 0.2),
    Constant("cuda.memory.kernels", 0.60, "share", "of eager's bytes, kernels fused by hand", "bytes counted", 0.3),
    Constant("cuda.memory.compiled", 0.45, "share", "of eager's bytes, compiled", "bytes counted", 0.3),
    Constant("cuda.memory.cross_entropy", 0.5, "share", "of the loss's bytes where it is fused", "bytes counted", 0.4),
    Constant("cuda.kernel_seconds", 2.5e-6, "s", "least time of one kernel on the device", "empty kernels' tail", 0.4),
    # starting operations
    Constant("cuda.host.share", 2.0, "launches", "host time of one operation, of a bare launch's", _EAGER, 0.5),
    Constant("cuda.host.backward", 2.0, "forwards", "host time of the backward", _EAGER, 0.3),
    Constant("cuda.host.collective_seconds", 30e-6, "s", "host time of one collective", "torch.distributed", 0.5),
    Constant("cuda.host.sharpness", 2.0, "exponent", "how sharply host and device time overlap", JOINED, 0.6),
    Constant("cuda.host.tied_sharpness", 1.5, "exponent", "the same where collectives tie hosts", JOINED, 0.6),
    Constant("cuda.step_seconds", 2e-3, "s", "host time of one step beside its layers", GUESS, 1.0),
    Constant("cuda.data.unit_seconds", 8e-9, "s", "reading a token of the batch and sending it", _READ),
    # collectives
    Constant("cuda.net.start_seconds", 6.5e-6, "s", "of any collective", _NCCL, 0.3),
    Constant("cuda.net.ramp_seconds", 45e-6, "s", "lost until a large message is at speed", _NCCL, 0.3),
    Constant("cuda.net.ramp_bytes", 4e6, "bytes", "on the wire at which half of that is lost", _NCCL, 0.3),
    Constant("cuda.net.ring_share", 0.80, "share", "of the inner link in a ring of many", _NCCL, 0.08),
    Constant("cuda.net.few_ranks", 0.4, "ranks", "speed lost by few ranks, over their number", _NCCL, 0.2),
    Constant("cuda.net.gather_share", 0.93, "share", "of all-reduce's bus speed, gather and scatter", _NCCL, 0.1),
    Constant("cuda.net.tree_share", 0.5, "share", "of a bus that all devices share", _NCCL, 0.2),
    Constant("cuda.net.switch_share", 0.97, "share", "of the measured bus with sums in the switch", _NCCL, 0.1),
    Constant("cuda.net.inter_share", 0.85, "share", "of a network card", "nccl-tests issue 290: 46-48 of 50 GB/s", 0.5),
    Constant("cuda.net.jitter_seconds", 5e-6, "s", "waiting for the last rank, per doubling", GUESS, 0.7, False),
    # overlap
    Constant("cuda.overlap.slows", 0.13, "share", "computing slows under a collective", "Galvatron's profiles", 0.5),
    Constant("cuda.overlap.share", 1.0, "share", "of the overlap a framework is built for", "perfect", 0.2),
    # recompute, optimizer, offload
    Constant("cuda.recompute.share", 1.0, "share", "of the forward that full recompute repeats", "all of it", 0.1),
    Constant(
        "cuda.optimizer.bytes", 32.0, "bytes", "per parameter: AdamW reads 16, writes 12, the norm 4", "count", 0.3
    ),
    Constant("cuda.optimizer.scaling_bytes", 4.0, "bytes", "per parameter: unscaling and the check", "count", 0.5),
    Constant("cuda.offload.bytes_per_second", 25e9, "bytes/s", "to the host, per device", "Azure: A100 26 GB/s", 0.5),
    Constant("cuda.offload.elements_per_second", 1e9, "1/s", "updated by the host, per device", "ZeRO-Offload", 0.7),
)
