"""Fitting the generator to noisy sums: what is learned, what is not, and that it can be repeated."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from common.config import ImageConfig, ModelConfig, WarmupConfig
from common.features import CONSTANT, feature_dim, feature_map, features
from common.lens import low_pass
from common.models import build
from server.warmup import Detail, Progress, Target, fit_generator, target

FM = feature_map(28)
LATENT = 8


def vectors(images: Tensor, labels: Tensor) -> Tensor:
    return features(FM, images)


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
    goals = [target(vectors, noisy, std)]
    return fit_generator(generator, goals, config, LATENT, torch.Generator().manual_seed(seed))


def test_target_counts_without_exact_counts() -> None:
    std = 1.5
    found = target(vectors, sums((400, 100), std), std)
    assert found.weights.sum().item() == pytest.approx(1)
    assert found.weights[0] > found.weights[1] > 0
    assert torch.allclose(found.means[:, 0], torch.tensor(CONSTANT))


def test_drowned_class() -> None:
    found = target(vectors, sums((300, 0, 300), 1.5), 1.5)
    assert found.weights[1] == 0
    assert found.weights[[0, 2]].sum().item() == pytest.approx(1)


def test_floor() -> None:
    noisy = torch.full((3, feature_dim(FM)), 0.5, dtype=torch.float64)
    noisy[:, 0] = torch.tensor([-50.0, 0.0, 1e-9])
    means = target(vectors, noisy, 1.0).means
    assert torch.all(torch.isfinite(means))
    assert torch.all(means[:, 1:].abs() <= 0.5 * CONSTANT + 1e-6)


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


class Constants(nn.Module):
    """A generator of one grey value a class, whatever the latent: the fit's least squares can be solved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.grey = nn.Parameter(torch.zeros(2))

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        return self.grey[labels][:, None, None, None].expand(-1, 1, 28, 28) + 0 * latent.sum()


def grey(images: Tensor, labels: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))[:, None]


def test_releases_weigh_as_their_noise_says() -> None:
    both = torch.tensor([0.5, 0.5])
    goals = [
        Target(grey, torch.tensor([[0.6], [0.3]]), both, 3.0),
        Target(grey, torch.tensor([[0.2], [-0.1]]), both, 1.0),
    ]
    generator = Constants()
    config = WarmupConfig(steps=400, batch_size=8, learning_rate=0.02)
    *_, last = fit_generator(generator, goals, config, 2, torch.Generator().manual_seed(0))
    assert torch.allclose(
        generator.grey, torch.tensor([0.5, 0.2]), atol=0.01
    )  # (3 x 0.6 + 0.2) / 4, (3 x 0.3 - 0.1) / 4
    assert last.loss == pytest.approx(0.75 * 0.1**2 + 0.25 * 0.3**2, rel=0.1)


def fine(generator: nn.Module) -> list[Tensor]:
    latent = torch.randn(64, LATENT, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        images = [generator(latent, torch.full((64,), label)) for label in (0, 1)]
    return [part - low_pass(part) for part in images]


def far(first: Tensor, second: Tensor) -> float:
    return float((first - second).square().mean())


@pytest.mark.slow
def test_fine_detail_is_held_alike_or_kept() -> None:
    def coarse(images: Tensor, labels: Tensor) -> Tensor:
        return images.flatten(2).flatten(1)[:, ::29]  # says little of fine detail

    means = torch.stack(
        [coarse(discs(50, at, torch.Generator().manual_seed(1)), torch.zeros(50)).mean(0) for at in (9, 19)]
    )
    goals = [Target(coarse, means, torch.tensor([0.5, 0.5]), 1.0)]
    config = WarmupConfig(steps=120, batch_size=32, learning_rate=5e-3)
    between, from_start, loss = {}, {}, {}
    details: tuple[Detail, ...] = ("free", "alike", "kept")
    for detail in details:
        generator = make_generator(2)
        before = fine(generator)
        *_, last = fit_generator(generator, goals, config, LATENT, torch.Generator().manual_seed(0), detail)
        after = fine(generator)
        between[detail], loss[detail] = far(*after), last.loss
        from_start[detail] = sum(map(far, before, after))
    assert between["alike"] < 0.5 * between["free"]
    assert from_start["kept"] < 0.5 * min(from_start["free"], from_start["alike"])
    assert max(loss.values()) < 0.2 * float(means.square().sum(dim=1).mean())  # each fits what is asked
