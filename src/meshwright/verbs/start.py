"""The start of every verb: read the job, its model and its cluster, and locate problems in the job file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import CannotWork, InputError, Problem

if TYPE_CHECKING:
    from meshwright.card import Card
    from meshwright.cluster import Cluster
    from meshwright.job import Job
    from meshwright.plan.mixed import MixedCluster


def read_job(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    data_must_exist: bool = True,
    further_check: Callable[[Job], object] | None = None,
) -> Job:
    """A Job as it is, or the one in a file with overrides.

    Raises InputError with every problem; those of `further_check` too, which is called with the valid part of a faulty
    job.
    """
    from meshwright.job import Job, load_job, valid_part

    if isinstance(job, Job):
        if overrides:
            raise InputError(Problem("overrides", "are for job files", "give the values to Job(...)"))
        return job
    try:
        return load_job(job, overrides, data_must_exist=data_must_exist)
    except InputError as error:
        problems = list(error.problems)
        try:
            rest = None if further_check is None else valid_part(job, overrides)
            if (
                further_check is not None and rest is not None and rest.model.module is None
            ):  # would run a module's code
                further_check(rest)
        except (InputError, CannotWork) as further:
            problems += [problem for problem in further.problems if problem not in problems]
        raise InputError(problems) from None


def gather(*calls: Callable[[], Any]) -> list[Any]:
    """The results of all calls. Where some raise InputError or CannotWork, raises one error with all problems."""
    results, failures = [], []
    for call in calls:
        try:
            results.append(call())
        except (InputError, CannotWork) as error:
            failures.append(error)
    if failures:
        kind = InputError if any(isinstance(error, InputError) for error in failures) else CannotWork
        raise kind([problem for error in failures for problem in error.problems]) from failures[0]
    return results


@contextmanager
def locate_problems(job: Job) -> Iterator[None]:
    """Adds the file and line of a key to problems with the job: "job.toml:12: data.source"."""
    try:
        yield
    except (InputError, CannotWork) as error:
        raise type(error)([replace(one, where=location_of(job, one.where)) for one in error.problems]) from error


def location_of(job: Job, key: str) -> str:
    """The key, with the file and line of its value where the job has one."""
    origin = job.origins.get(key, "default")
    return key if origin in ("default", "Python") else f"{origin}: {key}"


def card_of_job(job: Job, style: str = "plain") -> Card:
    """The card of the job's model: computed for a family or a Hugging Face folder, traced for a module. `style` is how
    a framework computes its blocks (`style_of`)."""
    with locate_problems(job):
        if job.model.module is not None:
            from meshwright import trace

            return trace.card_of_job(job)
        from meshwright import families

        return families.card_of_job(job, style)


def cluster_of_job(job: Job) -> Cluster:
    """The job's cluster: this machine, or devices of the table."""
    if job.cluster.groups:
        what = "devices of several kinds can only be planned for"
        hint = "name one kind: cluster.named and cluster.devices"
        raise CannotWork(Problem(location_of(job, "cluster.groups"), what, hint))
    from meshwright.cluster import resolve_cluster

    with locate_problems(job):
        cluster = resolve_cluster(job.cluster)
    price = job.cluster.dollars_per_hour
    return cluster if price is None else replace(cluster, dollars_per_hour=price)


def groups_of_job(job: Job) -> MixedCluster:
    """The groups of devices that the job names."""
    from meshwright.cluster import named_cluster
    from meshwright.plan.mixed import MixedCluster

    with locate_problems(job):
        named = [named_cluster(group.named, group.devices, group.devices_per_node) for group in job.cluster.groups]
        return MixedCluster(tuple(named))
