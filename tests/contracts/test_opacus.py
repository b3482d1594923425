"""What the private step relies on in Opacus, by numbers computed by hand. A change here stops an upgrade."""

import pytest
import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import nn


def _linear(weight: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
    return layer


def test_sum_reduction_gives_the_gradient_of_each_row() -> None:
    layer = _linear([0.0, 0.0])
    hooks = GradSampleHooks(layer, loss_reduction="sum")
    layer(torch.tensor([[3.0, 4.0], [0.3, 0.4]])).sum().backward()
    assert layer.weight.grad_sample.tolist() == [[[3.0, 4.0]], [[pytest.approx(0.3), pytest.approx(0.4)]]]
    hooks.remove_hooks()


def test_a_second_backward_needs_the_first_gradients_taken_away() -> None:
    layer = _linear([0.0, 0.0])
    hooks = GradSampleHooks(layer, loss_reduction="sum")
    for row in ([[1.0, 2.0]], [[5.0, 6.0]]):
        layer.weight.grad_sample = None
        layer(torch.tensor(row)).sum().backward()
        assert layer.weight.grad_sample.tolist() == [row]
    hooks.remove_hooks()


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
