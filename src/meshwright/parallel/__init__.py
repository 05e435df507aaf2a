"""Makes a plain module run as a Layout says: one mesh, one `apply`, one pipeline."""

from meshwright.parallel.apply import ParallelModel, apply
from meshwright.parallel.mesh import Mesh, fake_mesh, start
from meshwright.parallel.pipeline import Pipeline

__all__ = ["Mesh", "ParallelModel", "Pipeline", "apply", "fake_mesh", "start"]
