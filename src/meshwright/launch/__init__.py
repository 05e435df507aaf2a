"""Start functions by name as ranks, on this machine or on many: `launch.local("package.module:function", {...}, 4)`."""

from meshwright import env  # noqa: F401  # before gRPC, which it keeps quiet
from meshwright.launch.cluster_backend import ClusterBackend
from meshwright.launch.driver import Launch, keep, start
from meshwright.launch.groups import Need, Node, RankGroup
from meshwright.launch.hub_files import rotate
from meshwright.launch.local import LocalBackend, local, scratch_folder
from meshwright.launch.messages import Finished, Wait, Waited
from meshwright.launch.rank import Context

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
