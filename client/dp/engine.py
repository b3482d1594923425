"""What an engine is: it turns images of a discriminator into contributions of patients to its gradient."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from client.dp.contributions import Contribution, Unformed
from client.dp.packing import Chunk
from common.losses import Loss as Loss


class Engine(ABC):
    """A discriminator, and one way to get its gradients patient by patient."""

    @abstractmethod
    def contributions(self, loss: Loss, chunk: Chunk) -> tuple[list[Contribution], Unformed | None]:
        """Return what each patient contributes, for all parameters together.

        Args:
            loss: Of reals or of fakes.
            chunk: Patients, each in adjacent rows.

        Returns:
            Contributions, and one that is not formed yet: beside each other in the flat gradient, overwritten by the
            next call.
        """

    @abstractmethod
    def by_parameter(self, gradient: Float[Tensor, " gradient"]) -> list[Tensor]:
        """Cut the flat gradient into the shapes of the discriminator's parameters, in their order."""
