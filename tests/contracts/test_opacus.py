"""What the private step relies on in Opacus, by numbers computed by hand. A change here stops an upgrade."""

import pytest
import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import nn


def _linear(weight: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
    return layer


def _optimizer(layer: nn.Module, divisor: float) -> DPOptimizer:
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    return DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=divisor)


def test_sum_reduction_gives_the_gradient_of_each_row() -> None:
    layer = _linear([0.0, 0.0])
    hooks = GradSampleHooks(layer, loss_reduction="sum")
    layer(torch.tensor([[3.0, 4.0], [0.3, 0.4]])).sum().backward()
    assert layer.weight.grad_sample.tolist() == [[[3.0, 4.0]], [[pytest.approx(0.3), pytest.approx(0.4)]]]
    hooks.remove_hooks()


def test_clip_sum_and_public_divisor_by_hand() -> None:
    layer = _linear([0.0, 0.0])
    optimizer = _optimizer(layer, 4.0)
    layer.weight.grad_sample = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]])
    optimizer.clip_and_accumulate()
    # |(3, 4)| = 5 is clipped to norm 1, |(0.3, 0.4)| = 0.5 stays: sum (0.9, 1.2)
    torch.testing.assert_close(layer.weight.summed_grad, torch.tensor([[0.9, 1.2]]), rtol=1e-5, atol=1e-5)
    layer.weight.grad = layer.weight.summed_grad.clone()
    optimizer.scale_grad()
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.225, 0.3]]), rtol=1e-5, atol=1e-5)


def test_divisor_may_be_a_fraction() -> None:
    layer = _linear([0.0])
    optimizer = _optimizer(layer, 2.5)
    layer.weight.grad_sample = torch.tensor([[[1.0]]])
    optimizer.clip_and_accumulate()
    layer.weight.grad = torch.ones(1, 1)
    optimizer.scale_grad()
    assert layer.weight.grad.item() == pytest.approx(0.4)


def test_zero_grad_forgets_per_sample_gradients_and_sums() -> None:
    layer = _linear([0.0])
    optimizer = _optimizer(layer, 1.0)
    layer.weight.grad_sample = torch.tensor([[[1.0]]])
    optimizer.clip_and_accumulate()
    optimizer.zero_grad(set_to_none=True)
    assert (layer.weight.grad_sample, layer.weight.summed_grad, layer.weight.grad) == (None, None, None)


def test_same_gradients_cannot_be_used_twice() -> None:
    layer = _linear([0.0])
    optimizer = _optimizer(layer, 1.0)
    layer.weight.grad_sample = torch.tensor([[[1.0]]])
    optimizer.clip_and_accumulate()
    with pytest.raises(ValueError, match="cleared"):
        optimizer.clip_and_accumulate()


def test_disabled_hooks_compute_nothing() -> None:
    layer = _linear([0.0])
    hooks = GradSampleHooks(layer, loss_reduction="sum")
    hooks.disable_hooks()
    layer(torch.ones(2, 1)).sum().backward()
    assert getattr(layer.weight, "grad_sample", None) is None
    hooks.remove_hooks()


def test_batch_norm_is_refused() -> None:
    with pytest.raises(NotImplementedError):
        GradSampleHooks(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
