"""The processes that time the links really talk, and a failure says why."""

from __future__ import annotations

import pytest

from meshwright.errors import InputError
from meshwright.probe.links import COLLECTIVES, measure_links


def test_two_processes_are_timed() -> None:
    rows = measure_links(2, "lo")
    assert tuple(row.collective for row in rows) == COLLECTIVES
    for row in rows:
        assert (row.backend, row.processes) == ("gloo", 2)
        assert 0 < row.latency_seconds < 10
        assert row.message_bytes == 16 * 1024**2
        assert row.bytes_per_second > 0


def test_an_interface_that_is_not_there_is_a_failure_with_a_reason() -> None:
    with pytest.raises(InputError, match=r"launch\.interface: there is no network interface 'nosuch0'; known: .*lo"):
        measure_links(2, "nosuch0")
