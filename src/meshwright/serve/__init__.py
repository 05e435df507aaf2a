"""Serve a model over HTTP and gRPC: `main(folder, config)`, with `client` to ask it.

Loaded on first use, so that the pieces which run in other processes load only what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.serve.server import main

__all__ = ["main"]


def __getattr__(name: str) -> Any:
    if name == "main":
        from meshwright.serve.server import main

        return main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
