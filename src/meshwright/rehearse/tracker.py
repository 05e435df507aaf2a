"""Tracks the storages of all live tensors of a process, real or fake, and finds the peak.

A storage counts once, however many views it has, from the operation that allocates it until its last reference is gone.
Memory that an operation allocates and frees within itself is not seen, and neither is memory outside of tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from meshwright.rehearse.peak import CATEGORIES, Peak

#: Phases whose tensors, if they outlive the phase, are kept for a backward pass.
_BEFORE_BACKWARD = ("forward", "batch", "forward and backward")


@dataclass
class _Storage:
    """One storage: the passes (indices) in which it was created and freed, and (event, bytes) of each change."""

    reference: weakref.ref[Any]
    created: int
    category: str = ""
    freed: int | None = None
    changes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def first(self) -> int:
        return self.changes[0][0]

    def bytes_at(self, event: int) -> int:
        return next((size for at, size in reversed(self.changes) if at <= event), 0)


class Tracker(TorchDispatchMode):
    """A mode that counts the storages of every tensor that operations take or return.

    Each storage counts as a multiple of `rounding`, the allocator's. `workspace(operation, arguments)` gives the bytes
    that an operation allocates and frees within itself. With `fake`, for fake tensors, reading a value (item, float,
    tolist), which they do not have, gives 1, and waiting for a collective allocates nothing.
    """

    def __init__(
        self, *, rounding: int = 1, workspace: Callable[[Any, Any], int] | None = None, fake: bool = False
    ) -> None:
        super().__init__()
        self._rounding, self._workspace, self._fake = rounding, workspace, fake
        self._live: dict[int, _Storage] = {}
        self._all: list[_Storage] = []
        self._events = self._current = 0
        self._moment = ("set-up", "")
        self._peaks: dict[tuple[str, str], tuple[int, int, int]] = {}  # moment -> bytes, event, workspace bytes
        self._passes = ["set-up"]

    def __enter__(self) -> Tracker:
        self._resizes = _resize_hook(self._count)
        self._resizes.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resizes.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._fake and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if self._fake and func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as with real tensors; the fake operation would allocate another tensor
        self._detect_backward()
        result = func(*args, **(kwargs or {}))
        self._count_all((args, kwargs, result))
        if self._workspace is not None:
            self._update_peak(self._workspace(func, args))
        return result

    def enter(self, phase: str, block: str = "", *, new_pass: bool = False) -> None:
        """Begins a phase. With `new_pass` a new pass begins even if the phase is the same."""
        self._moment = (phase, block)
        if new_pass or self._passes[-1] != phase:
            self._passes.append(phase)

    def forget(self) -> None:
        """Forgets the peaks so far; live storages stay counted."""
        self._peaks = {}
        self._all = [entry for entry in self._all if entry.freed is None]

    def mark(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Sets the category of these tensors, which is otherwise inferred from when they are created and freed."""
        for tensor in tensors:
            for plain in _plain(tensor):
                storage = plain.untyped_storage()
                self._count(storage)
                if id(storage) in self._live:
                    self._live[id(storage)].category = category

    def peak(self) -> Peak:
        """The peak since the start, or since `forget`."""
        return self._peak(max(self._peaks, key=lambda moment: self._peaks[moment][0]))

    def peaks(self) -> dict[tuple[str, str], Peak]:
        """The peak of each (phase, block)."""
        return {moment: self._peak(moment) for moment in self._peaks}

    def _peak(self, moment: tuple[str, str]) -> Peak:
        total, event, workspace = self._peaks[moment]
        parts = dict.fromkeys(CATEGORIES, 0)
        for entry in self._all:
            if entry.first <= event and (entry.freed is None or entry.changes[-1][0] > event):
                parts[self._category(entry)] += entry.bytes_at(event)
        parts["temporaries"] += workspace
        return Peak(total, parts, *moment)

    def _category(self, entry: _Storage) -> str:
        phase = self._passes[entry.created]
        if entry.category or entry.freed == entry.created:
            return entry.category or "temporaries"
        if phase == "backward":
            return "gradients"
        return "activations" if phase in _BEFORE_BACKWARD else "temporaries"

    def _detect_backward(self) -> None:
        """Autograd does not report when it begins and ends, so every operation checks."""
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and self._passes[-1] != "backward":
            self.enter("backward", self._moment[1])
        elif not in_backward and self._passes[-1] == "backward":
            self.enter("forward and backward")

    def _count_all(self, tree: Any) -> None:
        if isinstance(tree, Tensor):
            for plain in _plain(tree):
                self._count(plain.untyped_storage())
        elif isinstance(tree, list | tuple):
            for leaf in tree:
                self._count_all(leaf)
        elif isinstance(tree, dict):
            self._count_all(list(tree.values()))

    def _count(self, storage: Any) -> None:
        """Counts a new storage, or the new size of a known one."""
        key, size = id(storage), -(-storage.nbytes() // self._rounding) * self._rounding
        entry = self._live.get(key)
        if entry is None:
            if not size:
                return
            entry = _Storage(weakref.ref(storage, lambda _: self._free(key)), len(self._passes) - 1)
            self._live[key] = entry
            self._all.append(entry)
        self._change(entry, size)

    def _free(self, key: int) -> None:
        entry = self._live.pop(key)
        self._change(entry, 0)
        entry.freed = len(self._passes) - 1

    def _change(self, entry: _Storage, size: int) -> None:
        before = entry.changes[-1][1] if entry.changes else 0
        if size == before:
            return
        self._events += 1
        self._current += size - before
        entry.changes.append((self._events, size))
        if size > before:
            self._update_peak(0)

    def _update_peak(self, workspace: int) -> None:
        if self._current + workspace > self._peaks.get(self._moment, (0,))[0]:
            self._peaks[self._moment] = (self._current + workspace, self._events, workspace)


def add_hooks(tracker: Tracker, module: nn.Module, has_loss: bool) -> None:
    """Hooks on an applied module that report its passes, blocks, weights and gradients to the tracker."""
    blocks = getattr(module, "blocks", None)
    named = dict(blocks.named_children()) if isinstance(blocks, nn.Module) else {}
    tracker.mark("weights", [*module.parameters(), *module.buffers()])

    def weights(part: nn.Module) -> Any:
        hooked: set[int] = set()

        def mark(*_: Any) -> None:
            for parameter in part.parameters():
                tracker.mark("weights", [parameter])
                if id(parameter) not in hooked and parameter.requires_grad:  # FSDP reuses its gathered parameters
                    hooked.add(id(parameter))
                    parameter.register_post_accumulate_grad_hook(gradient)

        return mark

    def gradient(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.mark("gradients", [parameter.grad])

    def labels(name: str) -> tuple[Any, Any]:
        def before(*_: Any) -> None:
            tracker.enter("forward", name)

        def after(_: Any, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: tracker.enter("backward", name))

        return before, after

    module.register_forward_pre_hook(lambda *_: tracker.enter("forward", new_pass=True), prepend=True)
    module.register_forward_pre_hook(weights(module))
    module.register_forward_hook(lambda *_: tracker.enter("forward", "loss" if has_loss else ""))
    for name, block in named.items():
        before, after = labels(name)
        block.register_forward_pre_hook(before, prepend=True)
        block.register_forward_pre_hook(weights(block))
        block.register_forward_hook(after)


class TrackedSpans:
    """Replaces a Trainer's Spans: reports the parts of a step to the tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    @contextmanager
    def __call__(self, name: str, step: int) -> Iterator[None]:
        self._tracker.enter(name)
        yield
        self._tracker.enter("between")


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the bytes of a wrapper (DTensor, a collective under way), or the tensor itself."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):  # a DTensor lists its mesh too
                yield from _plain(inner)
    elif tensor.device.type != "meta":
        yield tensor


@contextmanager
def _resize_hook(count: Any) -> Iterator[None]:
    """Calls `count` after every resize: FSDP frees and reallocates its buffers so, which no dispatch mode sees."""
    resize = torch.UntypedStorage.resize_

    def resize_and_count(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        count(storage)
        return result

    torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
