"""Follows every live tensor of a process, real or fake, and says what was held at the worst moment.

A storage counts once, however many views it has, from the operation that makes it until its last reference goes. What
an operation uses inside itself and gives back before it returns is not seen; neither is memory outside of tensors.
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

#: Phases whose tensors, if they outlive them, a backward pass waits for.
_AHEAD = ("forward", "batch", "forward and backward")


@dataclass
class _Storage:
    """One storage: the pass (an index) that it was born and died in, and its bytes from each event on."""

    reference: weakref.ref[Any]
    born: int
    category: str = ""
    died: int | None = None
    changes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def first(self) -> int:
        return self.changes[0][0]

    def bytes_at(self, event: int) -> int:
        return next((size for at, size in reversed(self.changes) if at <= event), 0)


class Tracker(TorchDispatchMode):
    """A mode that counts the storages of every tensor that operations take or return.

    `rounding` is the allocator's: each storage counts as a multiple of it. `inside` gives the bytes that an operation,
    named with its arguments, uses and gives back within itself. With `made_up`, for fake tensors, questions for a value
    (item, float, tolist), which they cannot answer, get 1, and what a collective made is its own once waited for.
    """

    def __init__(
        self, *, rounding: int = 1, inside: Callable[[Any, Any], int] | None = None, made_up: bool = False
    ) -> None:
        super().__init__()
        self._rounding, self._inside, self._made_up = rounding, inside, made_up
        self._live: dict[int, _Storage] = {}
        self._all: list[_Storage] = []
        self._events = self._current = 0
        self._at = ("set-up", "")
        self._worst: dict[tuple[str, str], tuple[int, int, int]] = {}  # bytes, event, and of them inside an operation
        self._passes = ["set-up"]

    def __enter__(self) -> Tracker:
        self._resized = _resizes_seen(self._see)
        self._resized.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resized.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._made_up and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if self._made_up and func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as a real one does; a fake one would take memory for another
        self._backward_or_not()
        result = func(*args, **(kwargs or {}))
        self._see_all((args, kwargs, result))
        if self._inside is not None:
            self._note(self._inside(func, args))
        return result

    def enter(self, phase: str, block: str = "", *, another: bool = False) -> None:
        """Says what happens from now on. `another`: a new pass, though the phase is the same."""
        self._at = (phase, block)
        if another or self._passes[-1] != phase:
            self._passes.append(phase)

    def forget(self) -> None:
        """Forgets the peaks so far; what is held stays counted."""
        self._worst = {}
        self._all = [entry for entry in self._all if entry.died is None]

    def mark(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Says what these tensors are for, whatever their lives would suggest."""
        for tensor in tensors:
            for plain in _plain(tensor):
                storage = plain.untyped_storage()
                self._see(storage)
                if id(storage) in self._live:
                    self._live[id(storage)].category = category

    def peak(self) -> Peak:
        """The worst moment since the start, or since `forget`."""
        moment = max(self._worst, key=lambda one: self._worst[one][0])
        return self._peak(moment)

    def peaks(self) -> dict[tuple[str, str], Peak]:
        """The worst of each (phase, block)."""
        return {moment: self._peak(moment) for moment in self._worst}

    def _peak(self, moment: tuple[str, str]) -> Peak:
        total, event, inside = self._worst[moment]
        parts = dict.fromkeys(CATEGORIES, 0)
        for entry in self._all:
            if entry.first <= event and (entry.died is None or entry.changes[-1][0] > event):
                parts[self._category(entry)] += entry.bytes_at(event)
        parts["temporaries"] += inside
        return Peak(total, parts, *moment)

    def _category(self, entry: _Storage) -> str:
        phase = self._passes[entry.born]
        if entry.category or entry.died == entry.born:
            return entry.category or "temporaries"
        if phase == "backward":
            return "gradients"
        return "activations" if phase in _AHEAD else "temporaries"

    def _backward_or_not(self) -> None:
        """Autograd does not say when it begins and ends: looked up at each operation."""
        inside = torch._C._current_graph_task_id() != -1
        if inside and self._passes[-1] != "backward":
            self.enter("backward", self._at[1])
        elif not inside and self._passes[-1] == "backward":
            self.enter("forward and backward")

    def _see_all(self, tree: Any) -> None:
        if isinstance(tree, Tensor):
            for plain in _plain(tree):
                self._see(plain.untyped_storage())
        elif isinstance(tree, list | tuple):
            for leaf in tree:
                self._see_all(leaf)
        elif isinstance(tree, dict):
            self._see_all(list(tree.values()))

    def _see(self, storage: Any) -> None:
        """Counts a storage, or notes its new size."""
        key, size = id(storage), -(-storage.nbytes() // self._rounding) * self._rounding
        entry = self._live.get(key)
        if entry is None:
            if not size:
                return
            entry = _Storage(weakref.ref(storage, lambda _: self._die(key)), len(self._passes) - 1)
            self._live[key] = entry
            self._all.append(entry)
        self._change(entry, size)

    def _die(self, key: int) -> None:
        entry = self._live.pop(key)
        self._change(entry, 0)
        entry.died = len(self._passes) - 1

    def _change(self, entry: _Storage, size: int) -> None:
        before = entry.changes[-1][1] if entry.changes else 0
        if size == before:
            return
        self._events += 1
        self._current += size - before
        entry.changes.append((self._events, size))
        if size > before:
            self._note(0)

    def _note(self, inside: int) -> None:
        if self._current + inside > self._worst.get(self._at, (0,))[0]:
            self._worst[self._at] = (self._current + inside, self._events, inside)


def follow(tracker: Tracker, module: nn.Module, has_loss: bool) -> None:
    """Has `module`, applied, tell the tracker which pass and block it is in, and what its weights and gradients are."""
    blocks = getattr(module, "blocks", None)
    named = dict(blocks.named_children()) if isinstance(blocks, nn.Module) else {}
    tracker.mark("weights", [*module.parameters(), *module.buffers()])

    def weights(part: nn.Module) -> Any:
        known: set[int] = set()

        def mark(*_: Any) -> None:
            for parameter in part.parameters():
                tracker.mark("weights", [parameter])
                if id(parameter) not in known and parameter.requires_grad:  # FSDP keeps its gathered parameters
                    known.add(id(parameter))
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

    module.register_forward_pre_hook(lambda *_: tracker.enter("forward", another=True), prepend=True)
    module.register_forward_pre_hook(weights(module))
    module.register_forward_hook(lambda *_: tracker.enter("forward", "loss" if has_loss else ""))
    for name, block in named.items():
        before, after = labels(name)
        block.register_forward_pre_hook(before, prepend=True)
        block.register_forward_pre_hook(weights(block))
        block.register_forward_hook(after)


class Parts:
    """Stands where a Trainer has its Spans: the tracker learns which part of the step begins."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    @contextmanager
    def __call__(self, name: str, step: int) -> Iterator[None]:
        self._tracker.enter(name)
        yield
        self._tracker.enter("between")


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the bytes of one that wraps others (DTensor, a collective under way)."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):  # a DTensor names its mesh there too
                yield from _plain(inner)
    elif tensor.device.type != "meta":
        yield tensor


@contextmanager
def _resizes_seen(see: Any) -> Iterator[None]:
    """FSDP frees and takes back what it gathers by resizing storages, which no dispatch mode sees."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        see(storage)
        return result

    torch.UntypedStorage.resize_ = resized  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
