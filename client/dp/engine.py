"""What an engine is: it turns images of a discriminator into contributions of patients to its gradient."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float, Int64
from torch import Tensor, nn

from client.dp.contributions import Contribution, Unformed

Loss = Callable[[Float[Tensor, " rows"]], Float[Tensor, " rows"]]
"""Loss of each row from its logit."""


class Engine(ABC):
    """A discriminator, and one way to get its gradients patient by patient."""

    @property
    @abstractmethod
    def discriminator(self) -> nn.Module:
        """The network whose gradients are taken."""

    @abstractmethod
    def contributions(
        self,
        loss: Loss,
        images: Float[Tensor, "rows 1 size size"],
        labels: Int64[Tensor, " rows"],
        weights: Float[Tensor, " rows"],
        slots: int,
    ) -> tuple[list[Contribution], Unformed | None]:
        """Return what each patient contributes, for all parameters together.

        Args:
            loss: Of reals or of fakes.
            images: `slots` adjacent rows for each patient.
            labels: Class numbers.
            weights: Of each row in its patient's contribution; 0 for a blank row.
            slots: Rows of one patient.

        Returns:
            Contributions, and one that is not formed yet: beside each other in the flat gradient, overwritten by the
            next call.
        """

    @abstractmethod
    def by_parameter(self, gradient: Float[Tensor, " gradient"]) -> list[Tensor]:
        """Cut the flat gradient into the shapes of `discriminator.parameters()`, in their order."""
