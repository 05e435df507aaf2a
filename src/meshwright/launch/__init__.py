"""Start functions by name as ranks, on this machine or on many: `launch.local("package.module:function", {...}, 4)`.

Names are loaded on first use: a rank needs `Context` alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.launch.cluster_backend import ClusterBackend
    from meshwright.launch.driver import Launch, keep, start
    from meshwright.launch.groups import Need, Node, RankGroup
    from meshwright.launch.hub_files import rotate
    from meshwright.launch.messages import Finished, Wait, Waited
    from meshwright.launch.rank import Context
    from meshwright.launch.this_machine import LocalBackend, local, scratch_folder

#: Public name -> module.
_MODULES = {
    **dict.fromkeys(("Launch", "keep", "start"), "driver"),
    **dict.fromkeys(("Need", "Node", "RankGroup"), "groups"),
    **dict.fromkeys(("LocalBackend", "local", "scratch_folder"), "this_machine"),
    **dict.fromkeys(("Finished", "Wait", "Waited"), "messages"),
    "ClusterBackend": "cluster_backend",
    "Context": "rank",
    "rotate": "hub_files",
}

__all__ = [
    "ClusterBackend",
    "Context",
    "Finished",
    "Launch",
    "LocalBackend",
    "Need",
    "Node",
    "RankGroup",
    "Wait",
    "Waited",
    "keep",
    "local",
    "rotate",
    "scratch_folder",
    "start",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"meshwright.launch has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"meshwright.launch.{_MODULES[name]}"), name)
