"""torch's process group over the keys of the job's hub: no port of torch's own store is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from meshwright.launch import Context
from meshwright.launch.hub_client import Keys

#: The longest wait for the other ranks, where the caller names none.
USUAL_TIMEOUT_SECONDS = 300.0


@contextmanager
def process_group(
    context: Context, backend: str, *, timeout_seconds: float = USUAL_TIMEOUT_SECONDS, name: str = ""
) -> Iterator[None]:
    """The default process group of all ranks of `context`, which is destroyed at exit.

    backend: torch's word, such as "gloo" or "cpu:gloo,cuda:nccl". A missing rank or a stalled collective raises after
    `timeout_seconds`. `name` tells the groups apart that the ranks of one generation make one after another.
    """
    dist.init_process_group(
        backend,
        store=store_of(context, name, timeout_seconds),
        rank=context.rank,
        world_size=context.world,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def store_of(context: Context, name: str = "", timeout_seconds: float = USUAL_TIMEOUT_SECONDS) -> dist.Store:
    """A torch.distributed.Store that the ranks of the role of `context` share, apart from those of other names."""
    if context.world == 1:
        return dist.HashStore()  # nobody to meet
    store = HubStore(context.keys(f"{context.role}/{name}/"), timeout_seconds)
    context.held.append(store)  # torch itself holds no reference to the Python object
    return store


class HubStore(dist.Store):
    """torch's operations on the keys of a hub."""

    def __init__(self, keys: Keys, timeout_seconds: float) -> None:
        super().__init__()
        self._keys, self._timeout_seconds = keys, timeout_seconds

    def set(self, key: str, value: str | bytes) -> None:
        self._keys.set(key, _bytes(value))

    def get(self, key: str) -> bytes:
        return self._keys.get(key, self._timeout_seconds)

    def add(self, key: str, amount: int) -> int:
        return self._keys.add(key, amount)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._keys.compare_set(key, _bytes(expected), _bytes(desired))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._keys.wait(keys, self._timeout_seconds if timeout is None else timeout.total_seconds())

    def check(self, keys: list[str]) -> bool:
        return self._keys.check(keys)

    def delete_key(self, key: str) -> bool:
        return self._keys.delete(key)

    def num_keys(self) -> int:
        return self._keys.count()

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_seconds = timeout.total_seconds()

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._timeout_seconds)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
