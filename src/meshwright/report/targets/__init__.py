"""A planned job in the words of the schedulers that Meshwright hands itself to.

Each target has a file with a function from a ScheduledJob to a Handout; TARGETS is their table. Names of options and
fields are those of Slurm 22.05, JobSet v1alpha2, Kubeflow Trainer v1alpha1 (2.3), KubeRay v1 (1.6), Kueue 0.12, Knative
serving v1, YARN services 3.4, SkyPilot 0.14 and Ray 2.55.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meshwright.report.targets import kubernetes, ray, skypilot, slurm, yarn
from meshwright.report.targets.job import Access, Handout, ScheduledJob

#: What `launch --on` takes -> what is written for it.
TARGETS: Mapping[str, Callable[[ScheduledJob], Handout]] = {
    "slurm": slurm.handout,
    "kubernetes": kubernetes.handout,
    "ray": ray.handout,
    "yarn": yarn.handout,
    "skypilot": skypilot.handout,
}

__all__ = ["TARGETS", "Access", "Handout", "ScheduledJob"]
