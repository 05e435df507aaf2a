"""One replica under a steady load: the number of active sequences, and how long a request waits.

Between two tokens of a sequence every sequence gets one token, and the prompts that arrived meanwhile are read. With B
active sequences of O tokens each, B / O prompts arrive in that time, so

    tpot = decode(B) + B / O x read,         requests per second = B / (O x tpot)         (Little's law)

where `decode(B)` is a step of B rows and `read` is the time that reading one prompt adds to its steps. Requests that
arrive at random (Poisson) wait for the prompts before them (an M/D/1 queue) and, in a full batch, for a free place
(M/M/c in Sakasegawa's approximation, 1977). Requests of a fixed number of clients ("closed") come in bunches: those
read in one step end in one step. Chunked prefill: Agrawal et al., "Sarathi-Serve" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from meshwright.plan.serving.time import PARTS, Step, StepModel, StepSeconds


@dataclass(frozen=True)
class Load:
    """A replica in steady state. `sequences` is the mean number of active ones, `utilisation` the share of the capacity
    in use, and `parts` splits the seconds between two tokens."""

    sequences: float
    ttft_seconds: float
    tpot_seconds: float
    requests_per_second: float
    utilisation: float
    parts: Mapping[str, float]


class Replica:
    """One replica (`model`) that answers requests of `prompt_tokens` with `output_tokens`, at most `batch` at once."""

    def __init__(self, model: StepModel, prompt_tokens: int, output_tokens: int, batch: int) -> None:
        self.model, self.prompt, self.output, self.batch = model, prompt_tokens, output_tokens, batch
        chunk = model.server.chunk_tokens
        #: No step reads more than a chunk, which limits the number of active sequences.
        self.most = max(1.0, min(float(batch), chunk * output_tokens / prompt_tokens))
        self.chunk = chunk
        self.chunks = math.ceil(prompt_tokens / chunk)
        self._stage = lru_cache(maxsize=4096)(self._stage_seconds)

    def _stage_seconds(self, rows: float, prompt: float) -> StepSeconds:
        context = self.prompt + self.output / 2
        sampled = rows + prompt / self.prompt
        return self.model.step(Step(rows, context, prompt, self.prompt / 2, sampled))

    def _rows(self, sequences: float) -> float:
        """Rows per step of one stage: every stage of a pipeline has a micro-batch."""
        return max(1.0, sequences / self.model.pp)

    def decode_seconds(self, sequences: float) -> float:
        """Seconds between two tokens of a sequence while no prompt is read."""
        return sum(self.decode_parts(sequences).values())

    def decode_parts(self, sequences: float) -> dict[str, float]:
        rows, pp = self._rows(sequences), self.model.pp
        parts = {part: pp * seconds for part, seconds in self._stage(rows, 0.0).parts.items()}
        parts["hops"] += pp * self.model.hop_seconds(rows)
        parts["host"] += pp * self.model.host_seconds(rows)
        return parts

    def _reading(self, sequences: float) -> float:
        """Prompt tokens of a step that reads any: one prompt, or all that arrive between two tokens."""
        least = min(self.prompt, self.chunk)
        return min(float(self.chunk), max(least, sequences * self.prompt / self.output / self.model.pp))

    def read_parts(self, sequences: float) -> dict[str, float]:
        """Seconds that reading one prompt adds to the steps that decode beside it."""
        rows, chunk = self._rows(sequences), self._reading(sequences)
        alone, mixed = self._stage(rows, 0.0).parts, self._stage(rows, chunk).parts
        return {part: (mixed[part] - alone[part]) * self.prompt / chunk for part in PARTS}

    def read_seconds(self, sequences: float) -> float:
        return sum(self.read_parts(sequences).values())

    def prompt_seconds(self, sequences: float, together: float = 1.0) -> float:
        """Seconds from the first step that reads a prompt to its first token, with `together` prompts read at once."""
        rows, model = self._rows(sequences), self.model
        tokens = together * self.prompt
        chunks = max(1.0, tokens / self.chunk)
        chunk = min(tokens, float(self.chunk))
        seconds = self._stage(rows, chunk).total + model.host_seconds(rows)
        return (chunks + model.pp - 1) * seconds + model.pp * model.hop_seconds(chunk)

    def closed(self, sequences: float | None = None) -> Load:
        """The load with always `sequences` (default: the batch) active: a new request comes when one ends."""
        active = min(self.most, sequences or self.most)
        reading = self.read_seconds(active)
        share = active / self.output
        tpot = self.decode_seconds(active) + share * reading
        bunch = min(active, max(1.0, self.chunk / self.prompt))
        served = self.prompt_seconds(active, (bunch + 1) / 2)
        busy = share * reading / tpot
        queued = min(busy / (2 * (1 - busy)), active / 2) * served if busy < 1 else active / 2 * served
        crowd = queued if self.chunk < self.prompt * active else 0.0
        return self._load(active, tpot / 2 + served + crowd, tpot, active / (self.output * tpot), 1.0)

    def capacity(self) -> float:
        """The most requests per second."""
        return self.closed().requests_per_second

    def open(self, requests_per_second: float) -> Load | None:
        """The load of random requests at this rate; None above the capacity."""
        capacity = self.capacity()
        if requests_per_second >= capacity:
            return None
        active, tpot = self._at_rate(requests_per_second)
        reading = self.prompt_seconds(active)
        full = self._stage(self._rows(active), float(self.chunk)).total + self.model.host_seconds(active)
        busy = min(0.999, requests_per_second * self.prompt / self.chunk * full)
        wait = busy / (2 * (1 - busy)) * reading
        places, used = self.batch, min(0.999, active / self.batch)
        wait += used ** (math.sqrt(2 * (places + 1)) - 1) / (places * (1 - used)) * self.output * tpot
        ttft = tpot / self.model.pp / 2 + wait + reading
        return self._load(active, ttft, tpot, requests_per_second, requests_per_second / capacity)

    def _at_rate(self, rate: float) -> tuple[float, float]:
        """Active sequences and seconds per token at `rate`: the least fixed point of Little's law, from below."""
        active = tpot = 0.0
        for _ in range(200):
            reading = self.read_seconds(active)
            tpot = self.decode_seconds(active) / max(1e-9, 1 - rate * reading)
            more = min(self.most, rate * self.output * tpot)
            if abs(more - active) <= 1e-4 * max(1.0, more):
                return more, tpot
            active = more
        return active, tpot

    def _load(self, active: float, ttft: float, tpot: float, rate: float, used: float) -> Load:
        parts = self.decode_parts(active)
        for part, seconds in self.read_parts(active).items():
            parts[part] += rate * tpot * seconds
        return Load(active, ttft + self.model.request_seconds, tpot, rate, used, parts)
