"""Fitting the generator to noisy sums: what is learned, what is not, and that it can be repeated."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from common.config import ImageConfig, ModelConfig, WarmupConfig
from common.features import CONSTANT, feature_dim, feature_map, features
from common.models import build
from server.warmup import Progress, _distance, fit_generator, target

FM = feature_map(28)
LATENT = 8


def make_generator(classes: int, seed: int = 0) -> nn.Module:
    config = ModelConfig.model_validate({"name": "mlp", "latent_dim": LATENT, "generator_width": 8})
    return build(config, ImageConfig(size=28), classes, torch.Generator().manual_seed(seed)).generator


def discs(count: int, centre: float, rng: torch.Generator) -> Tensor:
    axis = torch.arange(28.0)
    radius = 4 + 3 * torch.rand(count, 1, 1, generator=rng)
    distance = ((axis[None, :, None] - 14) ** 2 + (axis[None, None] - centre) ** 2).sqrt()
    return torch.tanh(radius - distance)[:, None]


def sums(counts: tuple[int, ...], noise_std: float, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    rows = [features(FM, discs(max(count, 1), 9.0 + 10 * row, rng))[:count].sum(0) for row, count in enumerate(counts)]
    total = torch.stack(rows).double()
    return total + noise_std * torch.randn(total.shape, generator=rng, dtype=torch.float64)


def fit(generator: nn.Module, noisy: Tensor, std: float, steps: int = 250, seed: int = 0) -> Iterator[Progress]:
    config = WarmupConfig(steps=steps, batch_size=32, learning_rate=5e-3)
    return fit_generator(generator, noisy, std, FM, config, LATENT, torch.Generator().manual_seed(seed))


def test_target_counts_without_exact_counts() -> None:
    std = 1.5
    found = target(sums((400, 100), std), std)
    assert found.weights.sum().item() == pytest.approx(1)
    assert found.weights[0] > found.weights[1] > 0
    assert torch.allclose(found.means[:, 0], torch.tensor(CONSTANT))


def test_drowned_class() -> None:
    found = target(sums((300, 0, 300), 1.5), 1.5)
    assert found.weights[1] == 0
    assert found.weights[[0, 2]].sum().item() == pytest.approx(1)


def test_floor() -> None:
    noisy = torch.full((3, feature_dim(FM)), 0.5, dtype=torch.float64)
    noisy[:, 0] = torch.tensor([-50.0, 0.0, 1e-9])
    means = target(noisy, 1.0).means
    assert torch.all(torch.isfinite(means))
    assert torch.all(means[:, 1:].abs() <= 0.5 * CONSTANT + 1e-6)


def test_noiseless_sums_are_accepted() -> None:
    found = target(sums((10, 10), 0.0), 0.0)
    assert torch.allclose(found.weights, torch.tensor([0.5, 0.5]), atol=1e-6)


def test_nothing_learned() -> None:
    generator = make_generator(2)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    assert list(fit(generator, torch.zeros(2, feature_dim(FM), dtype=torch.float64), 5.0)) == []
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


@pytest.mark.slow
def test_deterministic() -> None:
    noisy = sums((200, 200), 1.0)
    first, second, other = make_generator(2), make_generator(2), make_generator(2)
    losses = [[p.loss for p in fit(g, noisy, 1.0, 5, s)] for g, s in ((first, 0), (second, 0), (other, 1))]
    assert losses[0] == losses[1] != losses[2]
    kept, again = first.state_dict(), second.state_dict()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.slow
def test_the_classes_are_learned_apart() -> None:
    generator = make_generator(2)
    steps = list(fit(generator, sums((400, 400), 1.0), 1.0))
    assert [p.step for p in steps] == list(range(1, 251))
    assert steps[-1].loss < 0.5 * steps[0].loss
    latent = torch.randn(64, LATENT, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        left = generator(latent, torch.zeros(64, dtype=torch.long)).mean(0)[0]
        right = generator(latent, torch.ones(64, dtype=torch.long)).mean(0)[0]
    assert left[14, 9] > left[14, 19] + 0.2
    assert right[14, 19] > right[14, 9] + 0.2


def test_the_distance_is_unbiased_in_the_batch() -> None:
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 5, generator=rng)
    weights = torch.ones(1)
    draws = torch.randn(4000, 1, 4, 5, generator=rng) + mean
    distances = torch.stack([_distance(vectors, mean, weights) for vectors in draws])
    error = distances.std() / len(draws) ** 0.5
    assert distances.mean().abs() < 4 * error
    assert 20 * error < 5 / 4  # what the plain, biased estimate would give is far outside
