"""What one replica does under a steady load: how many sequences are at work, and what a request waits for.

Between two tokens of a sequence every sequence gets one, and the prompts that came meanwhile are read. With B sequences
of O tokens each at work, B / O prompts come in that time, so

    tpot = decode(B) + B / O x read,         requests per second = B / (O x tpot)         (Little's law)

where `decode(B)` is a step of B rows and `read` what reading one prompt adds to the steps that it shares. Requests that
come at random (Poisson) wait for the prompts before them (an M/D/1 queue) and, where all places are taken, for a place
(M/M/c in Sakasegawa's approximation, 1977). Requests of a fixed number of clients ("closed") come in bunches: those
that were read in one step end in one step. Chunked prefill: Agrawal et al., "Sarathi-Serve" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from meshwright.plan.serving.time import PARTS, Step, StepModel, StepSeconds


@dataclass(frozen=True)
class Load:
    """A replica in steady state. `sequences` is how many are at work on average, `utilisation` the share of the most
    requests that it could take; `parts` says where the seconds between two tokens go."""

    sequences: float
    ttft_seconds: float
    tpot_seconds: float
    requests_per_second: float
    utilisation: float
    parts: Mapping[str, float]


class Replica:
    """One replica (`model`) answering requests of `prompt_tokens` with `output_tokens`, `batch` at once at most."""

    def __init__(self, model: StepModel, prompt_tokens: int, output_tokens: int, batch: int) -> None:
        self.model, self.prompt, self.output, self.batch = model, prompt_tokens, output_tokens, batch
        chunk = model.server.chunk_tokens
        #: No step reads more than a chunk, so no more sequences can be kept at work than chunks feed.
        self.most = max(1.0, min(float(batch), chunk * output_tokens / prompt_tokens))
        self.chunk = chunk
        self.chunks = math.ceil(prompt_tokens / chunk)
        self._stage = lru_cache(maxsize=4096)(self._stage_seconds)

    def _stage_seconds(self, rows: float, prompt: float) -> StepSeconds:
        context = self.prompt + self.output / 2
        sampled = rows + prompt / self.prompt
        return self.model.step(Step(rows, context, prompt, self.prompt / 2, sampled))

    def _rows(self, sequences: float) -> float:
        """Rows of one stage's step: a pipeline has a micro-batch on every stage."""
        return max(1.0, sequences / self.model.pp)

    def decode_seconds(self, sequences: float) -> float:
        """From one token of a sequence to its next while no prompt is read."""
        return sum(self.decode_parts(sequences).values())

    def decode_parts(self, sequences: float) -> dict[str, float]:
        rows, pp = self._rows(sequences), self.model.pp
        parts = {part: pp * seconds for part, seconds in self._stage(rows, 0.0).parts.items()}
        parts["hops"] += pp * self.model.hop_seconds(rows)
        parts["host"] += pp * self.model.host_seconds(rows)
        return parts

    def _reading(self, sequences: float) -> float:
        """Prompt tokens that a step reads, where it reads any: one prompt, or as many as come between two tokens."""
        least = min(self.prompt, self.chunk)
        return min(float(self.chunk), max(least, sequences * self.prompt / self.output / self.model.pp))

    def read_parts(self, sequences: float) -> dict[str, float]:
        """What reading one prompt adds to the steps that decode beside it."""
        rows, chunk = self._rows(sequences), self._reading(sequences)
        alone, mixed = self._stage(rows, 0.0).parts, self._stage(rows, chunk).parts
        return {part: (mixed[part] - alone[part]) * self.prompt / chunk for part in PARTS}

    def read_seconds(self, sequences: float) -> float:
        return sum(self.read_parts(sequences).values())

    def prompt_seconds(self, sequences: float, together: float = 1.0) -> float:
        """From the first step that reads a prompt to its first token, where `together` prompts are read at once."""
        rows, model = self._rows(sequences), self.model
        tokens = together * self.prompt
        chunks = max(1.0, tokens / self.chunk)
        chunk = min(tokens, float(self.chunk))
        each = self._stage(rows, chunk).total + model.host_seconds(rows)
        return (chunks + model.pp - 1) * each + model.pp * model.hop_seconds(chunk)

    def closed(self, sequences: float | None = None) -> Load:
        """Always `sequences` (default: the batch) at work: a new request comes when one ends."""
        at_work = min(self.most, sequences or self.most)
        reading = self.read_seconds(at_work)
        share = at_work / self.output
        tpot = self.decode_seconds(at_work) + share * reading
        bunch = min(at_work, max(1.0, self.chunk / self.prompt))
        served = self.prompt_seconds(at_work, (bunch + 1) / 2)
        busy = share * reading / tpot
        queued = min(busy / (2 * (1 - busy)), at_work / 2) * served if busy < 1 else at_work / 2 * served
        crowd = queued if self.chunk < self.prompt * at_work else 0.0
        return self._load(at_work, tpot / 2 + served + crowd, tpot, at_work / (self.output * tpot), 1.0)

    def capacity(self) -> float:
        """The most requests a second."""
        return self.closed().requests_per_second

    def open(self, requests_per_second: float) -> Load | None:
        """Requests come at random at this rate; None where they come faster than they can be answered."""
        capacity = self.capacity()
        if requests_per_second >= capacity:
            return None
        at_work, tpot = self._at_rate(requests_per_second)
        rows_step = self.prompt_seconds(at_work)
        full = self._stage(self._rows(at_work), float(self.chunk)).total + self.model.host_seconds(at_work)
        busy = min(0.999, requests_per_second * self.prompt / self.chunk * full)
        wait = busy / (2 * (1 - busy)) * rows_step
        places, used = self.batch, min(0.999, at_work / self.batch)
        wait += used ** (math.sqrt(2 * (places + 1)) - 1) / (places * (1 - used)) * self.output * tpot
        ttft = tpot / self.model.pp / 2 + wait + rows_step
        return self._load(at_work, ttft, tpot, requests_per_second, requests_per_second / capacity)

    def _at_rate(self, rate: float) -> tuple[float, float]:
        """Sequences at work and seconds a token at `rate`: the least fixed point of Little's law, from below."""
        at_work = tpot = 0.0
        for _ in range(200):
            reading = self.read_seconds(at_work)
            tpot = self.decode_seconds(at_work) / max(1e-9, 1 - rate * reading)
            more = min(self.most, rate * self.output * tpot)
            if abs(more - at_work) <= 1e-4 * max(1.0, more):
                return more, tpot
            at_work = more
        return at_work, tpot

    def _load(self, at_work: float, ttft: float, tpot: float, rate: float, used: float) -> Load:
        parts = self.decode_parts(at_work)
        for part, seconds in self.read_parts(at_work).items():
            parts[part] += rate * tpot * seconds
        return Load(at_work, ttft + self.model.request_seconds, tpot, rate, used, parts)
