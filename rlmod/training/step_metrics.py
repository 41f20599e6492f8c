"""Metrics of the training steps, averaged over all micro-batches and ranks."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlmod import ops


class StepMetrics:
    """Sums and counts by name. They stay on the device, so that nothing waits for it until they are read.

    The mean of a per-token value does not depend on how the tokens are split into micro-batches, nor on the number of ranks.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Float[Tensor, " 2"]] = {}

    def add(self, name: str, values: Float[Tensor, "..."], mask: Bool[Tensor, "R T"] | None = None) -> None:
        """Add the values of the tokens under the mask that are not NaN. A single number counts for every token.

        Without a mask, add one number, even if it is NaN.
        """
        values = values.detach()
        if mask is None:
            added = torch.stack([values.float(), torch.ones_like(values, dtype=torch.float32)])
        else:
            counted = mask & ~values.isnan()
            total = torch.where(counted, values, 0).sum(dtype=torch.float32)
            added = torch.stack([total, counted.sum(dtype=torch.float32)])
        self.sums[name] = self.sums[name] + added if name in self.sums else added

    def reduce_and_reset(self) -> dict[str, tuple[float, float]]:
        """Return name -> (sum, count) over all ranks, and reset. All ranks must have added the same names."""
        sums = ops.all_sum(torch.stack(list(self.sums.values())))
        found = {name: (total, count) for name, (total, count) in zip(self.sums, sums.tolist(), strict=True)}
        self.sums = {}
        return found
