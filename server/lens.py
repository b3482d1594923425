"""Make the lens of a release from the generator as it stands, and choose how much a release may look at.

No patient enters: fakes and public numbers decide everything here. Out of scope: what a lens is (common/lens).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from common.config import Config
from common.errors import ConfigError
from common.features import LOW_COSINES
from common.lens import NETWORK_FEATURES, Lens, Sight, coordinates, make_network
from common.look import PUBLIC, look_dims
from common.models import draw_weights
from common.plan import Plan

CLEAR = 1.5
"""A class's sum over the noise in it at which a map is taken; below, the next smaller one."""
DROWNED = 0.5
"""The same below which nothing is asked for at all: the noise is more than twice the sum."""
_FAKES = 3000
_CHUNK = 500
_REACH = 0.88
"""Share of the images that lie inside length 1 of a lens; what lies outside is cut, which costs no privacy."""
_REACH_UNFITTED = 0.5
"""The same where images of all kinds stand in: patients are more alike than these."""
_LEAST_SPREAD = 0.1
"""No coordinate's spread counts for less than this part of the largest: what fakes never vary in, patients may."""
_LEAST_LENGTH = 1e-3
"""Of fakes that are all alike: a scale of 0 would divide by 0."""
_NETWORK_STEPS = 500
_NETWORK_BATCH = 80


@final
@dataclass(frozen=True)
class Outlook:
    """What a release would show of a class: numbers that are public before anybody is asked.

    Attributes:
        dims: Length of a vector by map: `public` and the sights of a lens.
        length: A class's longest possible sum, classes taken as equally large, over the noise of one coordinate.
    """

    dims: Mapping[str, int]
    length: float

    def clearness(self, name: str) -> float:
        """Return a class's sum over the length of the noise in it."""
        return self.length / math.sqrt(self.dims[name])


def outlook(config: Config, plans: Sequence[Plan]) -> Outlook:
    """Reckon how clear each map would be.

    Args:
        config: The run's configuration.
        plans: Of each site that takes part, with a warm-up.
    """
    noise_std = math.sqrt(sum(agreed.share_warmup_noise**2 for agreed in plans))
    patients = sum(agreed.declared_patients for agreed in plans)
    return Outlook(look_dims(config.image), patients / max(1, len(config.image.classes)) / noise_std)


def choose(seen: Outlook, largest: str) -> str:
    """Return the largest map that is clear: `largest` or `means`.

    Raises:
        ConfigError: Even `means` drowns; the message says by how much, and how many coordinates would not.
    """
    if seen.clearness(largest) >= CLEAR:
        return largest
    if seen.clearness("means") < DROWNED:
        raise ConfigError(
            f"Expected a warm-up whose noise is at most {1 / DROWNED:g} times the sum of a class, got "
            f"{1 / seen.clearness('means'):.1f} times with {seen.dims['means']} coordinates, the fewest there are; "
            f"{int((seen.length / DROWNED) ** 2) or 'not one'} would do. Raise privacy.epsilon or warmup.share, lower "
            "warmup.refinements, name fewer image.classes, or find more patients. Nothing was charged for it."
        )
    return "means"


def foretell(config: Config, plans: Sequence[Plan]) -> str:
    """Say what the warm-up of a run would look at, in a line for people.

    Args:
        config: The run's configuration.
        plans: Of each site that takes part, with a warm-up.

    Raises:
        ConfigError: It drowns.
    """
    seen = outlook(config, plans)
    looks = [choose(seen, PUBLIC if number == 0 else "learned") for number in range(1 + config.refinements)]
    told = [
        f"{look} ({seen.dims[look]:,} numbers, a class {seen.clearness(look):.1f} times its noise)" for look in looks
    ]
    return f"warm-up: {len(looks)} release{'s' * (len(looks) > 1)}, looking at {', then '.join(dict.fromkeys(told))}"


def make_lens(
    generator: nn.Module | None, config: Config, sight: Sight, rng: torch.Generator, fitted: bool = True
) -> Lens:
    """Make a lens from a generator's fakes.

    Args:
        generator: As it stands; None before anything was learned.
        config: Classes, sizes, latent length.
        sight: How much the lens sees.
        rng: The only source of randomness.
        fitted: Whether the generator was fitted to the patients. If not, images with the amplitudes of natural ones
            stand beside its fakes: patients may look quite different from what it was trained on.

    Guarantees:
        - deterministic: Equal arguments, generator states and thread counts give equal lenses.
        - fakes_fit: Most fakes of a fitted generator lie inside length 1, in every block.
    """
    labels = torch.arange(_FAKES) % len(config.image.classes)
    reach = _REACH if generator and fitted else _REACH_UNFITTED
    drawn = [] if generator is None else [_fakes(generator, labels, config, rng)]
    images = torch.cat(drawn if generator and fitted else [*drawn, _pink(config, rng)])
    labels = labels.repeat(len(images) // _FAKES)
    network = _train_network(images, labels, config, rng) if sight == "learned" else None
    with torch.no_grad():
        seen = torch.cat([coordinates(network, part) for part in images.split(_CHUNK)])
    # Cosines are centred on all classes together: what differs between them is what is asked. A network's features
    # tell the classes apart by construction, so that each class has its own centre there.
    widths = [LOW_COSINES * config.image.channels, seen.shape[1] - LOW_COSINES * config.image.channels]
    together, apart = seen.split(widths, dim=1)
    classes = range(len(config.image.classes))
    centre = torch.cat(
        [together.mean(dim=0).expand(len(classes), -1), torch.stack([apart[labels == c].mean(dim=0) for c in classes])],
        dim=1,
    )
    offsets = (seen - centre[labels]).split(widths, dim=1)
    return Lens(config.image, centre, torch.cat([_scale(block, reach) for block in offsets if block.shape[1]]), network)


def _scale(offsets: Float[Tensor, "fakes width"], reach: float) -> Float[Tensor, " width"]:
    spread = offsets.std(dim=0)
    spread = spread.clamp(min=_LEAST_SPREAD * float(spread.max().clamp(min=1e-6)))
    return spread * (offsets / spread).norm(dim=1).quantile(reach).clamp(min=_LEAST_LENGTH)


@torch.no_grad()
def _fakes(generator: nn.Module, labels: Int64[Tensor, " fakes"], config: Config, rng: torch.Generator) -> Tensor:
    latents = torch.randn(len(labels), config.model.latent_dim, generator=rng)
    return torch.cat([generator(z, y) for z, y in zip(latents.split(_CHUNK), labels.split(_CHUNK), strict=True)])


def _pink(config: Config, rng: torch.Generator) -> Float[Tensor, "fakes channels size size"]:
    """Draw images as natural ones are on the average: mid-grey, with amplitudes that fall with frequency."""
    size, channels = config.image.size, config.image.channels
    rows, columns = torch.meshgrid(torch.fft.fftfreq(size), torch.fft.rfftfreq(size), indexing="ij")
    fall = 1 / (1 + size * (rows.square() + columns.square()).sqrt())
    noise = torch.randn(_FAKES, channels, size, size, generator=rng)
    images = torch.fft.irfft2(torch.fft.rfft2(noise) * fall, s=(size, size))
    return (images / images.std() * 0.5).clamp(-1, 1)


def _train_network(
    images: Tensor, labels: Int64[Tensor, " fakes"], config: Config, rng: torch.Generator
) -> nn.Sequential:
    """Train the network of a lens to tell the classes of fakes apart; with one class its weights stay random."""
    classes = len(config.image.classes)
    with torch.device("meta"):
        network, last = make_network(config.image), nn.Linear(NETWORK_FEATURES, classes)
    whole = draw_weights(nn.Sequential(network, last), rng)
    optimizer = torch.optim.Adam(whole.parameters())
    for step in range(_NETWORK_STEPS if classes > 1 else 0):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / _NETWORK_STEPS))
        chosen = torch.randint(len(images), (_NETWORK_BATCH,), generator=rng)
        down, across = torch.randint(-1, 2, (2,), generator=rng).tolist()
        moved = torch.roll(images[chosen], (down, across), dims=(2, 3))
        loss = F.cross_entropy(whole(moved), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)
