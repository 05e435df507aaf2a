"""The cluster that `launch.on` names."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from meshwright import env
from meshwright.errors import InputError, Problem
from meshwright.launch.access import write_secret
from meshwright.launch.awaited import AwaitedBackend
from meshwright.launch.cluster_backend import ClusterBackend


def remote_backend(on: str, address: str | None, interface: str | None, devices: int | None) -> ClusterBackend:
    """The nodes of a Ray cluster ("ray") or those whose agents come by themselves ("agents").

    address: what `launch.address` says; interface: that ranks on Ray's nodes talk over (None: the one that leads to the
    hub); devices: of a Ray cluster that is started for the job. Raises InputError for an address that is missing or
    wrong or an interface for "agents", and what `launch.ray.RayBackend` raises.
    """
    if on == "agents":
        if address is None:
            raise InputError(Problem("launch.address", "is needed: agents dial it", "such as 0.0.0.0:7474"))
        if interface is not None:
            what = f"{interface!r} says nothing to agents that come by themselves"
            raise InputError(Problem("launch.interface", what, f"start each with --interface {interface}"))
        return AwaitedBackend(address)
    if importlib.util.find_spec("ray") is None:
        raise InputError(Problem("launch.on", "Ray is not installed", "pip install 'meshwright[ray]'"))
    # Ray reads its environment when it is imported: the token comes before.
    own = None
    if address is None:
        own = tempfile.TemporaryDirectory(prefix="mw-ray-", dir="/tmp")  # sockets of Ray lie there: a short path
        token = Path(own.name, "token")
        write_secret(token)
        env.set_ray_token(token)
    elif env.ray_token():
        env.use_ray_token()
    else:
        what = "Ray's token is missing: the cluster asks for it"
        near = "RAY_AUTH_TOKEN_PATH=FILE, with the file that the cluster was started with"
        raise InputError(Problem("launch.address", what, near))
    from meshwright.launch.ray import RayBackend

    return RayBackend(address, own, interface, devices)
