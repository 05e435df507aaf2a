"""The example that users copy: its card, and that its blocks compute what its forward does."""

from __future__ import annotations

from pathlib import Path

import torch

from meshwright.job import load_job
from meshwright.trace import card_of, card_of_job, load_factory

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_digits_example_has_a_card() -> None:
    factory = load_factory("digits:build", {"width": 8, "depth": 2}, folders=[EXAMPLES])
    card = card_of(factory, None, "digits")
    assert [block.name for block in card.blocks] == ["stem", "0", "1", "head"]
    assert card.splittable == {"pp"}
    assert card.stateful_buffers == ()
    module = factory()
    assert card.parameter_elements == sum(p.numel() for p in module.parameters())
    assert {p.name: p.shape for p in card.parameters} == {n: tuple(p.shape) for n, p in module.named_parameters()}
    stem = 64 * 9 * 8
    residual = 64 * 9 * 8 * 16 + 64 * 16 * 8
    assert card.forward_flops == 2 * (stem + 2 * residual + 8 * 16 * 10)


def test_the_digits_example_takes_images_and_rows_of_pixels() -> None:
    module = load_factory("digits:build", {"width": 8, "depth": 1}, folders=[EXAMPLES])()
    images = torch.rand(3, 8, 8)
    assert module(images).shape == (3, 10)
    torch.testing.assert_close(module(images.flatten(1)), module(images))


def test_the_digits_job_has_the_card_of_its_module() -> None:
    card = card_of_job(load_job(EXAMPLES / "digits.toml", ["model.arguments.depth=1"]))
    assert [block.name for block in card.blocks] == ["stem", "0", "head"]
    assert (card.unit, card.units_per_sample) == ("samples", 1)
