"""The work of the next step: continuous batching over a fixed number of slots, in plain integers (no torch)."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from meshwright.engine.request import Request

#: Prompt tokens of one step, over all requests: bounds how long a new prompt delays running requests.
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Move:
    """A copy of the first `length` cached tokens of slot `source` to slot `target`, before the rest of a step."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Segment:
    """Consecutive prompt tokens of one slot, from position `start` on. After the `last` segment a token is sampled."""

    slot: int
    start: int
    tokens: tuple[int, ...]
    last: bool


@dataclass(frozen=True)
class Work:
    """One step, the same on every rank.

    Slot s decodes `tokens[s]` at `positions[s]`. Slots in use are 0..n-1 without holes. A slot that still reads its
    prompt decodes token 0 at the next free position, which a later step overwrites: attention runs over a plain slice
    of the cache. `decoding` lists the slots whose row is sampled. All three are empty if nothing decodes.

    `keep`, unless it is empty, is the number of cached tokens of each slot in use after the moves; all else is set to
    zero. It follows numbers that are not finite, which would reach other requests even from masked places.
    """

    moves: tuple[Move, ...] = ()
    tokens: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    decoding: tuple[int, ...] = ()
    segments: tuple[Segment, ...] = ()
    keep: tuple[int, ...] = ()

    @property
    def slots(self) -> int:
        """Slots of the cache that the step writes to or reads, from 0 on."""
        return max([len(self.tokens), *(segment.slot + 1 for segment in self.segments)])

    @property
    def length(self) -> int:
        """Cached tokens of the longest of these slots after the step."""
        ends = [segment.start + len(segment.tokens) for segment in self.segments]
        return max([*(position + 1 for position in self.positions), *ends])

    def encode(self) -> list[int]:
        """As plain integers, the form in which work is sent to other processes."""
        head = [len(self.moves), len(self.tokens), len(self.decoding), len(self.segments), len(self.keep)]
        moves = [number for move in self.moves for number in (move.source, move.target, move.length)]
        out = [*head, *moves, *self.tokens, *self.positions, *self.decoding, *self.keep]
        for segment in self.segments:
            out += [segment.slot, segment.start, int(segment.last), len(segment.tokens), *segment.tokens]
        return out

    @staticmethod
    def decode(numbers: Sequence[int]) -> Work:
        """The Work that `encode` wrote."""
        move_count, rows, sampled_count, segment_count, kept_count = numbers[:5]
        at = 5

        def take(count: int) -> tuple[int, ...]:
            nonlocal at
            at += count
            return tuple(numbers[at - count : at])

        moves = tuple(Move(*take(3)) for _ in range(move_count))
        tokens, positions, decoding, keep = take(rows), take(rows), take(sampled_count), take(kept_count)
        segments = []
        for _ in range(segment_count):
            slot, start, last, length = take(4)
            segments.append(Segment(slot, start, take(length), bool(last)))
        return Work(moves, tokens, positions, decoding, tuple(segments), keep)


class Slots:
    """Assigns cache slots so that those in use are always 0..n-1: a batch is then a slice, not a gather."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._owners: list[int] = []

    @property
    def used(self) -> int:
        return len(self._owners)

    @property
    def owners(self) -> tuple[int, ...]:
        """Request ids by slot."""
        return tuple(self._owners)

    def acquire(self, owner: int) -> int | None:
        """Gives `owner` a slot; None if all are in use."""
        if len(self._owners) == self.count:
            return None
        self._owners.append(owner)
        return len(self._owners) - 1

    def release(self, slot: int) -> int | None:
        """Frees `slot`. If that would leave a hole, the highest slot's owner moves in, and its id is returned."""
        last_owner = self._owners.pop()
        if slot == len(self._owners):
            return None
        self._owners[slot] = last_owner
        return last_owner


@dataclass(eq=False)
class RunningRequest:
    """A request in progress: `cached` tokens are in the cache or in the current step."""

    id: int
    request: Request
    max_tokens: int
    stop_ids: frozenset[int]
    random: random.Random
    slot: int = -1
    cached: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def reading(self) -> bool:
        """Whether a part of the prompt is not read yet."""
        return self.cached < len(self.request.prompt_ids)


class Scheduler:
    """First come, first served: running requests decode every step; free slots read the next prompts, in chunks."""

    def __init__(self, max_batch: int, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.slots = Slots(max_batch)
        self._chunk_tokens = chunk_tokens
        self._waiting: deque[RunningRequest] = deque()
        self._running: dict[int, RunningRequest] = {}
        self._moves: list[Move] = []
        self._not_finite = False  # whether a request has ended with "error" since the last step

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, sequence: RunningRequest) -> None:
        """Queues a request."""
        self._waiting.append(sequence)

    def remove(self, id: int) -> bool:
        """Drops a request, waiting or running; its slot is free at once. False if there is none with that id."""
        sequence = self._running.pop(id, None)
        if sequence is None:
            before = len(self._waiting)
            self._waiting = deque(waiting for waiting in self._waiting if waiting.id != id)
            return len(self._waiting) < before
        moved_id = self.slots.release(sequence.slot)
        if moved_id is not None:
            other = self._running[moved_id]
            if other.cached:  # else it has never run, and the cache may not have grown to its slot
                self._moves.append(Move(other.slot, sequence.slot, other.cached))
            other.slot = sequence.slot
        return True

    def __contains__(self, sequence: object) -> bool:
        """Whether this sequence still runs: it may have been cancelled during a step."""
        return isinstance(sequence, RunningRequest) and self._running.get(sequence.id) is sequence

    def schedule(self) -> tuple[Work, list[RunningRequest]] | None:
        """The next step and the sequences that get a token, in the order of its logits; None if there is no work."""
        if not self._running:
            self._moves.clear()  # whose requests have all ended
        self._admit()
        if not self._running:
            return None
        moves, self._moves = tuple(self._moves), []
        by_slot = [self._running[owner] for owner in self.slots.owners]
        keep = tuple(s.cached for s in by_slot) if self._not_finite else ()
        self._not_finite = False
        segments, finishing = self._read_prompts()
        finished = {id(sequence) for sequence in finishing}
        decoding = [s for s in by_slot if not s.reading and id(s) not in finished]
        if not decoding:
            return Work(moves=moves, segments=tuple(segments), keep=keep), finishing
        sampled = {id(sequence) for sequence in decoding}
        tokens = tuple(s.generated[-1] if id(s) in sampled else 0 for s in by_slot)
        positions = tuple(s.cached for s in by_slot)
        for sequence in decoding:
            sequence.cached += 1
        work = Work(moves, tokens, positions, tuple(s.slot for s in decoding), tuple(segments), keep)
        return work, decoding + finishing

    def _admit(self) -> None:
        while self._waiting:
            slot = self.slots.acquire(self._waiting[0].id)
            if slot is None:
                return
            sequence = self._waiting.popleft()
            sequence.slot = slot
            self._running[sequence.id] = sequence

    def _read_prompts(self) -> tuple[list[Segment], list[RunningRequest]]:
        """The segments of this step, oldest request first, and the sequences whose prompt they complete."""
        room = self._chunk_tokens
        segments: list[Segment] = []
        finishing: list[RunningRequest] = []
        for sequence in self._running.values():
            if not sequence.reading or room == 0:
                continue
            start = sequence.cached
            tokens = sequence.request.prompt_ids[start : start + room]
            sequence.cached += len(tokens)
            room -= len(tokens)
            segments.append(Segment(sequence.slot, start, tuple(tokens), not sequence.reading))
            if not sequence.reading:
                finishing.append(sequence)
        return segments, finishing

    def postprocess(
        self, sampled: Iterable[tuple[RunningRequest, int | None]]
    ) -> list[tuple[RunningRequest, int, str | None]]:
        """Records one token per sequence and frees the slots of those that end; leaves out cancelled ones.

        A sequence without a token ends: (sequence, -1, "error").
        """
        out: list[tuple[RunningRequest, int, str | None]] = []
        for sequence, token in sampled:
            self._not_finite = self._not_finite or token is None
            if sequence not in self:
                continue
            if token is None:
                self.remove(sequence.id)
                out.append((sequence, -1, "error"))
                continue
            sequence.generated.append(token)
            reason = None
            if token in sequence.stop_ids:
                reason = "stop"
            elif len(sequence.generated) >= sequence.max_tokens:
                reason = "length"
            if reason:
                self.remove(sequence.id)
            out.append((sequence, token, reason))
        return out
