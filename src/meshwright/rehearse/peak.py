"""What a tracker of live tensors found: the worst moment of a rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: What a byte is for. Weights are those kept and those gathered; activations are what a forward pass left for its
#: backward, the batch and the pipeline's buffers with them; temporaries end with the pass that made them.
CATEGORIES = ("weights", "gradients", "optimizer", "activations", "temporaries")


@dataclass(frozen=True)
class Peak:
    """The most bytes that tensors held at once, by category, and when: `phase` of the step, in `block` if in one."""

    total: int
    parts: Mapping[str, int]
    phase: str
    block: str

    @property
    def moment(self) -> str:
        return f"{self.phase} of {self.block}" if self.block else self.phase

    def as_dict(self) -> dict[str, Any]:
        return {"peak_bytes": self.total, "parts": dict(self.parts), "phase": self.phase, "block": self.block}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Peak:
        return Peak(data["peak_bytes"], dict(data["parts"]), data["phase"], data["block"])


def extrapolated(fewer: Mapping[Any, Peak], more: Mapping[Any, Peak], micro_batches: int) -> Peak:
    """The peak of a step that has `micro_batches` more than `more`, which has one more than `fewer`.

    Both map a moment to the most held then. Once a schedule is in its stride, each moment grows by the same bytes for
    every further micro-batch (its share of the batch, its buffers; under GPipe its activations), so the worst of the
    straight lines is the peak.
    """

    def line(moment: Any) -> int:
        low = fewer[moment].total if moment in fewer else more[moment].total
        return more[moment].total + micro_batches * (more[moment].total - low)

    worst = max(more, key=line)
    high, low = more[worst], fewer.get(worst, more[worst])
    parts = {name: size + micro_batches * (size - low.parts[name]) for name, size in high.parts.items()}
    return Peak(line(worst), parts, high.phase, high.block)
