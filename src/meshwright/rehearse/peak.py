"""`Peak`: the result of a tracker of live tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: What bytes are for. Weights: shards and gathered copies. Activations: tensors saved for the backward pass, the batch,
#: and the pipeline's buffers. Temporaries: tensors that are freed in the pass that allocated them.
CATEGORIES = ("weights", "gradients", "optimizer", "activations", "temporaries")


@dataclass(frozen=True)
class Peak:
    """The most bytes that tensors hold at once, by category, and the moment: `phase` of the step, and `block` or ""."""

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


def extrapolate(fewer: Mapping[Any, Peak], more: Mapping[Any, Peak], micro_batches: int) -> Peak:
    """The peak of a step with `micro_batches` more than `more` has, which has one more than `fewer`.

    Both map a moment to its peak. In a schedule's steady state each further micro-batch adds the same bytes to a moment
    (its share of the batch, its buffers; under GPipe its activations). So every moment is a straight line, and the
    highest line is the peak.
    """

    def total(moment: Any) -> int:
        low = fewer[moment].total if moment in fewer else more[moment].total
        return more[moment].total + micro_batches * (more[moment].total - low)

    worst = max(more, key=total)
    high, low = more[worst], fewer.get(worst, more[worst])
    parts = {name: size + micro_batches * (size - low.parts[name]) for name, size in high.parts.items()}
    return Peak(total(worst), parts, high.phase, high.block)
