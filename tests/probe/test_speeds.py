"""What `measure` promises about its figures; how large they are is the machine's business."""

from __future__ import annotations

import json

import torch

from meshwright.cluster import available_cores
from meshwright.probe import measure
from meshwright.probe.speeds import best_seconds


def test_rates_are_positive_and_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    speeds = measure(seconds_each=0.001, processes=0)
    assert torch.get_num_threads() == before
    assert speeds.links == ()
    assert speeds.problems == ()
    assert set(speeds.memory_read_bytes_per_second) - {0} == {1, available_cores()}
    cpu = [product for product in speeds.products if (product.device, product.threads) == ("cpu", 1)]
    assert {product.precision for product in cpu} == {"fp32", "bf16"}
    assert all(product.flops_per_second > 0 for product in cpu)
    assert speeds.disk_write_bytes_per_second > 0
    assert json.loads(json.dumps(speeds.as_dict()))["products"][0]["precision"] == "fp32"


def test_a_link_that_fails_is_a_problem_and_the_rest_is_measured() -> None:
    speeds = measure(seconds_each=0.001, interface="nosuch0")
    assert speeds.links == ()
    assert "nosuch0" in str(speeds.problems[0])
    assert speeds.products


def test_the_shortest_of_several_tries_counts() -> None:
    calls = []
    assert best_seconds(lambda: calls.append(1), 0.0) >= 0.0
    assert len(calls) == 4  # one to warm up, three to count
