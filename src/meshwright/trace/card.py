"""`card_of`: builds a module on fake tensors, runs one forward pass, and returns its Card."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from meshwright import env
from meshwright.card import Block, Buffer, Card, Parameter
from meshwright.errors import InputError, Problem
from meshwright.trace.axes import parameter_axes
from meshwright.trace.factory import describe, print_to_stderr, user_code
from meshwright.trace.record import BlockRecord, Recorder, storage_of

SampleInputs = tuple[Tensor, Mapping[str, Tensor]]
KEY = "model.module"
FOLD = "for block in self.blocks.values(): x = block(x, **inputs)"
WHOLE = "all"  # the one block of a module that names none


def card_of(
    module_factory: Callable[[], nn.Module],
    sample_inputs: SampleInputs | Tensor | None,
    name: str,
    unit: str = "samples",
    units_per_sample: int = 1,
) -> Card:
    """The Card of the module that `module_factory` builds. Takes no memory: everything runs on fake tensors.

    `sample_inputs` is a batch of one: x [1, ...], or (x, keyword arguments) as `Task.inputs` returns; None calls the
    module's own `sample_input()`. A module with `blocks` (nn.ModuleDict) whose forward folds them gets a block per
    entry and may be a pipeline ("pp" in `splittable`); `parameter_axes` ({name: (axis or None, ...)}) adds "tp".
    Raises InputError if the module cannot be built or run so, or if its declarations are wrong. The module's output
    goes to stderr.
    """
    with (
        print_to_stderr(),
        _silence_torch_log(),
        FakeTensorMode(allow_non_fake_inputs=True),
        warnings.catch_warnings(),
        torch.random.fork_rng([]),
    ):
        # Fused CPU kernels hide the matrix products of recurrent layers from the recorder.
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False):
            module = module_factory()
            with user_code(f"train() of {type(module).__name__}"):
                module.train()
            x, inputs = _fake_inputs(module, sample_inputs)
            axes = parameter_axes(module)
            blocks = _declared_blocks(module)
            buffers = _buffers(module)
            tensors = {buffer.name: module.get_buffer(buffer.name) for buffer in buffers}
            saved_kinds = _saved_kinds(module)
            recorder = Recorder(module, blocks, axes or {})
            calls, output = _run(module, blocks, recorder, x, inputs)
            _refuse_other_kinds(saved_kinds, _saved_kinds(module))
            if blocks:
                _check_fold(blocks, calls, x, output)
            parameters = [
                Parameter(key, tuple(p.shape), (axes or {}).get(key, (None,) * p.dim()))
                for key, p in module.named_parameters()
            ]
            sizes = {block: returned.numel() for block, _, returned in calls}
            parts = (parameters, buffers)
            return Card(
                name=name,
                blocks=tuple(
                    _block(key, block, *parts, recorder.records[key], sizes[key]) for key, block in blocks.items()
                )
                or (_block("", module, *parts, recorder.records[""], output.numel()),),
                unit=unit,
                units_per_sample=units_per_sample,
                tied=_tied(module),
                splittable=frozenset(({"pp"} if len(blocks) > 1 else set()) | ({"tp"} if axes is not None else set())),
                stateful_buffers=_stateful_buffers(module, tensors, recorder.written_storages),
                built_whole=True,
            )


@contextlib.contextmanager
def _silence_torch_log() -> Iterator[None]:
    """Keeps torch from logging the traceback of a failed operation: our error says it in one line."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before = log.disabled
    log.disabled = before or not env.debug()
    try:
        yield
    finally:
        log.disabled = before


def _fake_inputs(module: nn.Module, sample: Any) -> SampleInputs:
    if sample is None:
        sample_input: Any = getattr(module, "sample_input", None)
        if not callable(sample_input):
            what = f"the shape of {type(module).__name__}'s input is unknown"
            raise InputError(Problem(KEY, what, "add a method sample_input() that returns a batch of one"))
        with user_code(f"sample_input() of {type(module).__name__}"):
            sample = sample_input()
    x, inputs = sample if isinstance(sample, tuple) and len(sample) == 2 else (sample, {})
    if not isinstance(inputs, Mapping) or not all(isinstance(tensor, Tensor) for tensor in (x, *inputs.values())):
        what = f"sample_input() returned a {type(sample).__name__}"
        raise InputError(Problem(KEY, what, "return a tensor [1, ...], or (tensor, {keyword: tensor})"))

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    return fake(x), {key: fake(value) for key, value in inputs.items()}


def _declared_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The module's ordered blocks by name, {} if it has none."""
    with user_code(f"reading blocks of {type(module).__name__}"):
        blocks = getattr(module, "blocks", None)
    if not isinstance(blocks, nn.ModuleDict) or not len(blocks):
        return {}
    saved = [name for name, _ in module.named_parameters()] + [one.name for one in _buffers(module) if one.persistent]
    outside = [name for name in saved if not name.startswith("blocks.")]
    if outside:
        what = f"it names its blocks, but '{outside[0]}' is in none of them"
        near = f"put every parameter and persistent buffer into one of the blocks, so that forward is: {FOLD}"
        raise InputError(Problem(KEY, what, near))
    return dict(blocks.items())


Calls = list[tuple[str, Any, Any]]  # (block, its input, its output), in the order of the calls


def _run(
    module: nn.Module, blocks: Mapping[str, nn.Module], recorder: Recorder, x: Tensor, inputs: Mapping[str, Tensor]
) -> tuple[Calls, Tensor]:
    calls: Calls = []

    def note(block: str) -> Callable[..., None]:
        return lambda _, args, output: calls.append((block, args[0] if args else None, output))

    handles = [block.register_forward_hook(note(name)) for name, block in blocks.items()]
    try:
        with recorder.watching():
            output = module(x, **inputs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        what = f"the forward pass depends on the values of its input, not only on their shape: {describe(error)}"
        raise InputError(Problem(KEY, what, "use torch.where instead of `if`, and no .item() or boolean index")) from (
            error
        )
    except (Exception, SystemExit) as error:  # the user's forward may raise anything
        what = f"the forward pass of an input {list(x.shape)} {str(x.dtype).removeprefix('torch.')} failed"
        raise InputError(Problem(KEY, f"{what}: {describe(error)}")) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        what = f"forward returned a {type(output).__name__}"
        raise InputError(Problem(KEY, what, "return one tensor: the logits"))
    return calls, output


def _check_fold(blocks: Mapping[str, nn.Module], calls: Calls, x: Tensor, output: Tensor) -> None:
    """Raises InputError unless the forward was the fold of the blocks: each once, in order, nothing between."""
    called = [name for name, _, _ in calls]
    wrong = ""
    if called != list(blocks):
        wrong = f"forward called the blocks {called}, and they are named in the order {list(blocks)}"
    current: Any = x
    for name, received, returned in calls:
        if not wrong and received is not current:
            wrong = f"something happens before block '{name}': it is not given what the one before it returned"
        if not wrong and not isinstance(returned, Tensor):
            wrong = f"block '{name}' returned a {type(returned).__name__}, not one tensor"
        current = returned
    if not wrong and output is not current:
        wrong = "something happens after the last block: forward does not return what it returned"
    if wrong:
        raise InputError(Problem(KEY, wrong, f"let forward be nothing but: {FOLD}"))


def _block(
    name: str,
    module: nn.Module,
    parameters: Sequence[Parameter],
    buffers: Sequence[Buffer],
    record: BlockRecord,
    output_elements: int,
) -> Block:
    """The Block of `module`, the block called `name`; "" is the whole module, of all `parameters` and `buffers`."""
    return Block(
        name=name or WHOLE,
        kind=type(module).__name__,
        parameters=tuple(p for p in parameters if not name or p.name.startswith(f"blocks.{name}.")),
        products=tuple(record.products),
        attention=record.attention,
        saved=record.saved_activations(),
        output_elements=output_elements,
        elementwise_elements=record.elementwise_elements,
        buffers=tuple(b for b in buffers if not name or b.name.startswith(f"blocks.{name}.")),
    )


def _buffers(module: nn.Module) -> list[Buffer]:
    """Every buffer once, under its first name. A tensor that is registered in several modules is a buffer of each."""
    return [
        Buffer(
            f"{path}.{name}".lstrip("."),
            tuple(tensor.shape),
            tensor.element_size(),
            name not in child._non_persistent_buffers_set,
        )
        for path, child in module.named_modules()
        for name, tensor in child.named_buffers(recurse=False)
    ]


def _saved_kinds(module: nn.Module) -> dict[str, str]:
    """Shape and type of every persistent buffer, in words."""
    names = [one.name for one in _buffers(module) if one.persistent]
    tensors = {name: module.get_buffer(name) for name in names}
    return {name: f"{list(one.shape)} {str(one.dtype).removeprefix('torch.')}" for name, one in tensors.items()}


def _refuse_other_kinds(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raises InputError for a persistent buffer to which the pass gave another shape or type, or which it made or
    removed: a checkpoint of it could not be read back into the module as it is built."""
    problems = [
        Problem(
            KEY,
            f"the buffer '{name}' is {before.get(name, 'nothing')} as built, and {after.get(name, 'nothing')} after a "
            "forward pass in training",
            "keep its shape and type, such as by self.NAME.copy_(value), or register it with persistent=False",
        )
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    if problems:
        raise InputError(problems)


def _tied(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Pairs (first name, alias) of parameters that are one tensor."""
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            pairs.append((first[id(parameter)], name))
        first.setdefault(id(parameter), name)
    return tuple(pairs)


def _stateful_buffers(module: nn.Module, before: Mapping[str, Tensor], written: Collection[int]) -> tuple[str, ...]:
    """Buffers that a training step changes: those of the storages `written` in the trace, those that are not the tensor
    that they were `before` it, and running statistics.

    torch's batch-norm kernels write running statistics without saying so in their schema. Raises InputError for one
    that is registered in several modules: each would have its own once the module is split.
    """
    running = {
        f"{path}.{name}".lstrip(".")
        for path, child in module.named_modules()
        if getattr(child, "track_running_stats", False)
        for name, _ in child.named_buffers(recurse=False)
    }
    stateful = tuple(
        name
        for name, tensor in before.items()
        if name in running or storage_of(tensor) in written or module.get_buffer(name) is not tensor
    )
    first: dict[int, str] = {}
    for name in stateful:
        if (other := first.setdefault(id(before[name]), name)) != name:
            what = f"'{other}' and '{name}' are one buffer, which training changes"
            raise InputError(Problem(KEY, what, "register it in one module, and call that module from both places"))
    return stateful
