"""What a release of the warm-up looks at: the public map, or a lens. Site and coordinator read a request alike.

Out of scope: the map (common/features), the lens (common/lens), summing (client/warmup).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from jaxtyping import Float, Int64
from torch import Tensor

from common import lens
from common.config import ImageConfig
from common.errors import WireError
from common.features import FeatureMap, feature_dim, feature_map, features
from common.lens import SIGHTS, lens_dim
from common.messages import Arrays, Scalar
from common.weights import check_arrays

PUBLIC = "public"

Vectors = Callable[[Float[Tensor, "batch channels size size"], Int64[Tensor, " batch"]], Float[Tensor, "batch dim"]]


@final
@dataclass(frozen=True)
class Look:
    """What is looked at.

    Attributes:
        vectors: Pixels in [-1, 1] and labels to vectors.
        dim: How long these are.
        trial: The same computation with numbers of our own in place of a sender's, to try what this machine does: a
            sender could choose some that hide it.
    """

    vectors: Vectors
    dim: int
    trial: Vectors


def look_dims(image: ImageConfig) -> dict[str, int]:
    """Return the length of a vector by what is looked at."""
    public = feature_dim(feature_map(image.size, image.channels))
    return {PUBLIC: public} | {sight: lens_dim(image, sight) for sight in SIGHTS}


def read_look(image: ImageConfig, look: Scalar | None, arrays: Arrays) -> Look:
    """Read what a request wants looked at; nothing of a site goes into it.

    Args:
        image: What an image is.
        look: `public`, or the sight of a lens.
        arrays: None for `public`, else the lens.

    Raises:
        WireError: There is no such map, or the arrays are not exactly its.
    """
    if look == PUBLIC:
        check_arrays(arrays, {})
        public = feature_map(image.size, image.channels)
        vectors = functools.partial(_without_labels, public)
        return Look(vectors, feature_dim(public), vectors)
    for sight in SIGHTS:
        if look == sight:
            vectors = functools.partial(lens.look, lens.from_arrays(image, sight, arrays))
            return Look(vectors, lens_dim(image, sight), functools.partial(lens.look, lens.plain_lens(image, sight)))
    raise WireError(f"Expected look to be {PUBLIC} or one of {', '.join(SIGHTS)}.")


def _without_labels(public: FeatureMap, images: Tensor, labels: Tensor) -> Float[Tensor, "batch dim"]:
    del labels
    return features(public, images)
