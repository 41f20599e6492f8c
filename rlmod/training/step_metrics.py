"""StepMetrics of what many micro-batches on many ranks measure."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlmod import ops


class StepMetrics:
    """Sums and counts by name, kept where they are measured: nothing waits for the device before they are read.

    The mean of a value of every token does not depend on how the tokens are cut into micro-batches, nor on the number of ranks.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Float[Tensor, " 2"]] = {}

    def add(self, name: str, values: Float[Tensor, "..."], mask: Bool[Tensor, "R T"] | None = None) -> None:
        """The values of the counted tokens that have one, that is, are not NaN; a single number stands for every token.

        Without a mask, one number, whatever it is.
        """
        values = values.detach()
        if mask is None:
            mine = torch.stack([values.float(), torch.ones_like(values, dtype=torch.float32)])
        else:
            counted = mask & ~values.isnan()
            total = torch.where(counted, values, 0).sum(dtype=torch.float32)
            mine = torch.stack([total, counted.sum(dtype=torch.float32)])
        self.sums[name] = self.sums[name] + mine if name in self.sums else mine

    def over_ranks(self) -> dict[str, tuple[float, float]]:
        """Name to sum and count, of all ranks, which have all measured the same names; and begins anew."""
        sums = ops.all_sum(torch.stack(list(self.sums.values())))
        found = {name: (total, count) for name, (total, count) in zip(self.sums, sums.tolist(), strict=True)}
        self.sums = {}
        return found
