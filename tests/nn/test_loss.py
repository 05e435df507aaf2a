from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright import launch
from meshwright.nn import cross_entropy_sum, loss


def reference(logits: Tensor, targets: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    """torch's own sum and its gradient, in fp32."""
    whole = logits.detach().float().requires_grad_()
    total = F.cross_entropy(whole.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum")
    (total * upstream).backward()
    assert whole.grad is not None
    return total.detach(), whole.grad


def ours(logits: Tensor, targets: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    total = cross_entropy_sum(leaf, targets)
    (total * upstream).backward()
    assert leaf.grad is not None
    return total.detach(), leaf.grad


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 2048, 2050])
def test_equals_torch_at_the_borders_of_its_runs_of_rows(rows: int) -> None:
    torch.manual_seed(rows)
    logits, targets = torch.randn(rows, 17) * 5, torch.randint(0, 17, (rows,))
    targets[::3] = -100
    expected, gradient = reference(logits, targets, 0.25)
    found, found_gradient = ours(logits, targets, 0.25)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-5, atol=1e-7)


def test_any_leading_dimensions_and_large_logits() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 11) * 1e4, torch.randint(0, 11, (3, 5))
    expected, gradient = reference(logits, targets)
    found, found_gradient = ours(logits, targets)
    assert found.shape == () and found.dtype == torch.float32 and found_gradient.shape == logits.shape
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradient, gradient)


def test_ignored_rows_cost_nothing_and_have_no_gradient() -> None:
    logits = torch.full((4, 7), 3.0)
    found, gradient = ours(logits, torch.full((4,), -100))
    assert found.item() == 0.0
    assert gradient.abs().max() == 0.0


def test_bf16_logits_have_a_bf16_gradient_of_an_fp32_sum() -> None:
    torch.manual_seed(1)
    logits, targets = torch.randn(50, 33).bfloat16(), torch.randint(0, 33, (50,))
    targets[7] = -100
    expected, gradient = reference(logits, targets)
    found, found_gradient = ours(logits, targets)
    assert found.dtype == torch.float32 and found_gradient.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found_gradient.float(), gradient, rtol=1e-2, atol=1e-6)


def test_without_a_gradient_only_the_sum_is_formed() -> None:
    logits, targets = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, -100])
    with torch.no_grad():
        total = cross_entropy_sum(logits, targets)
    assert not total.requires_grad
    torch.testing.assert_close(total, reference(logits, targets)[0])


def test_a_vocabulary_split_over_two_processes(tmp_path: Path) -> None:
    torch.manual_seed(2)
    logits, targets = torch.randn(9, 12) * 3, torch.randint(0, 12, (9,))
    targets[4] = -100
    expected, gradient = reference(logits, targets, 0.5)
    payload = {"logits": logits.tolist(), "targets": targets.tolist(), "upstream": 0.5}
    with launch.local("tests.nn.workers:split_loss", payload, 2, tmp_path, env={"OMP_NUM_THREADS": "1"}) as started:
        results = started.wait(120)
    for result in results:
        assert result["loss"] == pytest.approx(expected.item(), rel=1e-6)
    found = torch.cat([torch.tensor(result["gradient"]) for result in results], dim=-1)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


def test_ignored_is_torchs() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == loss.IGNORED
