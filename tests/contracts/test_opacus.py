"""What the reference engine relies on in Opacus, and what we do otherwise, by numbers computed by hand."""

import warnings

import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _generate_noise
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


def test_gradients_of_a_convolution_are_sums_over_places() -> None:
    layer = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    hooks = GradSampleHooks(layer, loss_reduction="sum")
    images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [0.0, 5.0]]]])
    layer(images).sum().backward()
    assert layer.weight.grad_sample.flatten().tolist() == [10.0, 5.0]
    assert layer.bias.grad_sample.flatten().tolist() == [4.0, 4.0]  # four places each
    hooks.remove_hooks()


def test_gradients_of_an_embedding_lie_in_the_chosen_row() -> None:
    layer = nn.Embedding(3, 2)
    hooks = GradSampleHooks(layer, loss_reduction="sum")
    (layer(torch.tensor([2, 0])) * torch.tensor([[1.0, 10.0], [2.0, 20.0]])).sum().backward()
    expected = [[[0.0, 0.0], [0.0, 0.0], [1.0, 10.0]], [[2.0, 20.0], [0.0, 0.0], [0.0, 0.0]]]
    assert layer.weight.grad_sample.tolist() == expected
    hooks.remove_hooks()


def test_gradients_of_a_group_norm() -> None:
    layer = nn.GroupNorm(1, 1, eps=0.0)
    hooks = GradSampleHooks(layer, loss_reduction="sum")
    out = layer(torch.tensor([[[1.0, 3.0]]]))  # normalised: -1, 1
    (out * torch.tensor([1.0, 5.0])).sum().backward()
    assert layer.weight.grad_sample.flatten().tolist() == [4.0]
    assert layer.bias.grad_sample.flatten().tolist() == [6.0]
    hooks.remove_hooks()


def test_their_optimizer_clips_adds_and_divides_as_ours() -> None:
    layer = _linear([0.0, 0.0])
    optimizer = DPOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=4
    )
    layer.weight.grad_sample = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]])
    optimizer.step()
    # (3, 4) has norm 5 and becomes (0.6, 0.8); (0.3, 0.4) stays: the sum is (0.9, 1.2), over 4
    assert layer.weight.tolist() == [[pytest.approx(-0.225, abs=1e-6), pytest.approx(-0.3, abs=1e-6)]]


def test_their_secure_noise_is_a_sum_of_four_over_two() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = _generate_noise(1.5, torch.zeros(3), generator=generator, secure_mode=True)
    again = torch.Generator().manual_seed(1)
    torch.normal(0.0, 1.5, (1, 1), generator=again)
    four = torch.stack([torch.normal(0.0, 1.5, (3,), generator=again) for _ in range(4)])
    torch.testing.assert_close(noise, four.sum(0) / 2)


@pytest.mark.parametrize(("patients", "expected"), [(63, 7), (64, 8), (65, 7)])
def test_their_divisor_follows_the_exact_size_of_the_data_set_and_so_ours_is_not_theirs(
    patients: int, expected: int
) -> None:
    model = _linear([0.0])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(patients, 1)), batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they warn that their random numbers are not secure
        _, optimizer, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    assert optimizer.expected_batch_size == expected


def test_their_secure_mode_needs_a_package_that_is_not_there() -> None:
    with pytest.raises(ImportError):
        PrivacyEngine(secure_mode=True)
