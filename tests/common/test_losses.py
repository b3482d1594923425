"""The losses' directions, and the bound on a critic."""

import pytest
import torch

from common.config import ImageConfig, ModelConfig, Proposal, TrainConfig
from common.generator_step import draw_fakes, generator_step
from common.losses import WEIGHT_BOUND, Losses, bound_weights, losses_of
from common.models import Pair, build

LOGITS = torch.tensor([-2.0, 0.0, 3.0])


def _pair(name: str) -> Pair:
    config = ModelConfig.model_validate({"name": name, "latent_dim": 4, "generator_width": 8, "discriminator_width": 8})
    return build(config, ImageConfig(size=28), 2, torch.Generator().manual_seed(0))


def _losses(name: str, loss: str = "logistic") -> Losses:
    return losses_of(_pair(name).discriminator, TrainConfig.model_validate({"loss": loss}))


def _slopes(loss: object) -> list[float]:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(loss(logits).sum(), logits)[0].tolist()  # type: ignore[operator]


def test_logistic_slopes_fade_where_d_is_sure() -> None:
    losses = _losses("mlp")
    told = torch.sigmoid(LOGITS)
    assert _slopes(losses.of_real) == pytest.approx((told - 1).tolist())
    assert _slopes(losses.of_fake) == pytest.approx(told.tolist())
    assert _slopes(losses.of_generator) == pytest.approx((told - 1).tolist())
    assert losses.weight_bound is None


def test_wasserstein_slopes_are_those_of_a_difference_of_means() -> None:
    losses = _losses("mlp", "wasserstein")
    assert (_slopes(losses.of_real), _slopes(losses.of_fake)) == ([-1.0] * 3, [1.0] * 3)
    assert _slopes(losses.of_generator) == [-1.0] * 3
    assert losses.weight_bound == WEIGHT_BOUND


def test_evidence_is_raised_and_meets_no_fakes() -> None:
    losses = _losses("vae")
    assert _slopes(losses.of_real) == [-1.0] * 3
    assert losses.of_fake is None
    assert losses.weight_bound is None


def test_post_processing_cuts_weights_to_the_bound_and_leaves_the_rest() -> None:
    discriminator = _pair("mlp").discriminator
    before = [parameter.clone() for parameter in discriminator.parameters()]
    bound_weights(discriminator, _losses("mlp"))
    assert all(torch.equal(old, new) for old, new in zip(before, discriminator.parameters(), strict=True))
    bound_weights(discriminator, _losses("mlp", "wasserstein"))
    for old, new in zip(before, discriminator.parameters(), strict=True):
        assert torch.equal(new, old.clamp(-WEIGHT_BOUND, WEIGHT_BOUND))
    assert any((old.abs() > WEIGHT_BOUND).any() for old in before)


@pytest.mark.parametrize("loss", ["logistic", "wasserstein"])
def test_generator_step_raises_the_logits_of_its_fakes(loss: str) -> None:
    pair = _pair("mlp")
    proposal = Proposal.model_validate(
        {"image": {"size": 28, "classes": ("a", "b")}, "model": {"latent_dim": 4}, "train": {"loss": loss}}
    )
    adam = torch.optim.Adam(pair.generator.parameters(), lr=1e-3)

    def mean_logit() -> float:
        with torch.no_grad():
            fakes, labels = draw_fakes(pair.generator, 64, proposal, torch.Generator().manual_seed(1))
            return pair.discriminator(fakes, labels).mean().item()

    before = mean_logit()
    for step in range(3):
        generator_step(pair.generator, pair.discriminator, adam, proposal, torch.Generator().manual_seed(step))
    assert mean_logit() > before
