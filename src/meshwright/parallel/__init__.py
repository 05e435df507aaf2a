"""Makes a plain module run as a Layout says: one mesh, one `apply`, one pipeline."""

from meshwright.parallel.apply import Applied, apply
from meshwright.parallel.mesh import Mesh, stand_in, start
from meshwright.parallel.pipeline import Pipeline

__all__ = ["Applied", "Mesh", "Pipeline", "apply", "stand_in", "start"]
