"""Start a function by name in processes of its own: `launch.local("package.module:function", {...}, processes=4)`."""

from meshwright.launch.local import LocalProcesses, interface_problem, local, scratch_folder
from meshwright.launch.messages import Context

__all__ = ["Context", "LocalProcesses", "interface_problem", "local", "scratch_folder"]
