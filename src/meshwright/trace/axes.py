"""A module's own table of logical axes, checked: a split that tensor parallelism does not support is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.layout import AXIS_RULES, split_dimension
from meshwright.trace.factory import user_code

Axes = dict[str, tuple[str | None, ...]]
CONTAINERS = (nn.ModuleDict, nn.ModuleList)  # their forward is never called


def parameter_axes(module: nn.Module) -> Axes | None:
    """`module.parameter_axes`: {parameter name: an axis of AXIS_RULES, or None, for each dimension}; None without one.

    Raises InputError listing every wrong entry: one that is not a list of axes, an unknown parameter or axis, a wrong
    number of dimensions, a split parameter of anything but a Linear or Embedding, and a split Linear without its
    counterpart in the same module.
    """
    with user_code(f"reading parameter_axes of {type(module).__name__}"):
        table: Any = getattr(module, "parameter_axes", None)
    if table is None:
        return None
    if not isinstance(table, Mapping):
        what = f"must be a table, found a {type(table).__name__}"
        raise InputError(Problem("parameter_axes", what, "{parameter name: (axis or None for each dimension)}"))
    unlisted = [name for name, entry in table.items() if not isinstance(entry, (tuple, list))]
    if unlisted:
        hint = "name an axis, or None, for each dimension"
        raise InputError([Problem(_where(str(name)), "must be a tuple of axes", hint) for name in unlisted])
    axes = {str(name): tuple(entry) for name, entry in table.items()}
    problems = list(_wrong_entries(module, axes)) or list(_wrong_splits(module, axes))
    if problems:
        raise InputError(problems)
    return axes


def _where(name: str) -> str:
    return f"parameter_axes['{name}']"


def _wrong_entries(module: nn.Module, axes: Axes) -> Iterator[Problem]:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(remove_duplicate=False)}
    for name, entry in axes.items():
        if name not in shapes:
            yield Problem(_where(name), "there is no such parameter", nearest_name(name, list(shapes)))
        elif len(entry) != len(shapes[name]):
            what = f"has {len(entry)} axes, the parameter {len(shapes[name])} dimensions {shapes[name]}"
            yield Problem(_where(name), what, "name an axis, or None, for each dimension")
        else:
            for axis in entry:
                if axis is not None and (not isinstance(axis, str) or axis not in AXIS_RULES):
                    yield Problem(_where(name), f"there is no axis '{axis}'", nearest_name(str(axis), list(AXIS_RULES)))


def _wrong_splits(module: nn.Module, axes: Axes) -> Iterator[Problem]:
    owners = dict(module.named_modules())
    for name, entry in axes.items():
        dim = split_dimension(entry)
        if dim is None:
            continue
        path, _, kind = name.rpartition(".")
        owner = owners[path]
        if not isinstance(owner, (nn.Linear, nn.Embedding)):
            what = f"a {type(owner).__name__} cannot be split, only Linear and Embedding can"
            yield Problem(_where(name), what, "let its axes be None")
        elif kind == "weight" and isinstance(owner, nn.Linear):
            yield from _wrong_linear(owners, axes, path, dim)


def _wrong_linear(owners: Mapping[str, nn.Module], axes: Axes, path: str, dim: int) -> Iterator[Problem]:
    """A Linear split by output needs one in the same module split by input, and the reverse, so that parts are summed.

    Only the output of the head may stay split: the loss takes its parts.
    """
    name = f"{path}.weight"
    axis = axes[name][dim]
    bias = f"{path}.bias"
    if dim == 0 and getattr(owners[path], "bias", None) is not None and axes.get(bias) != (axis,):
        yield Problem(_where(name), "its bias is not split with it", f"add '{bias}': ('{axis}',)")
    if dim == 0 and axis == "vocab":
        return
    parent = path.rpartition(".")[0]
    siblings = [
        child
        for child, kind in owners[parent].named_children()
        if isinstance(kind, nn.Linear) and split_dimension(axes.get(f"{parent}.{child}.weight", ())) == 1 - dim
    ]
    if isinstance(owners[parent], CONTAINERS) or not siblings:
        side, other = ("output", "input") if dim == 0 else ("input", "output")
        what = f"it is split by its {side}, and no Linear beside it in the same module is split by its {other}"
        yield Problem(_where(name), what, "split both Linears of a pair, in a module of their own that calls them")
