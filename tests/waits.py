"""Counts where the host would wait for a GPU, on a CPU: tensors that are read, and copies that are not queued."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

#: Operations whose result or its size is a value that the device computes.
READS = {
    aten._local_scalar_dense.default: "item",  # also int(), float(), bool(), and a scalar tensor as an index
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.equal.default: "equal",
}
#: Methods that copy to the host, which on a CPU no operation shows.
COPIES = {Tensor.tolist: "tolist", Tensor.cpu: "cpu", Tensor.numpy: "numpy"}


class Waits:
    """While it is entered, `found` lists each place at which the host would wait for a GPU."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = (_Functions(self.found), _Operations(self.found))

    def __enter__(self) -> Waits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in COPIES:
            self._found.append(COPIES[func])
        elif func is Tensor.to and _has_device(args[1:], named) and not named.get("non_blocking"):
            self._found.append("to")
        elif func is torch.tensor and "device" in named:
            self._found.append("tensor")
        return func(*args, **named)


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self._found.append(READS[func])
        elif func in (aten.index.Tensor, aten.index_put_.default) and any(
            one is not None and one.dtype is torch.bool for one in args[1]
        ):
            self._found.append("index by a mask")
        return func(*args, **(kwargs or {}))


def _has_device(args: Any, named: Any) -> bool:
    return any(isinstance(one, torch.device | str) for one in (*args, named.get("device")))
