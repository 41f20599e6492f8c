"""Forward passes over a whole collection, without gradients: pi_old's log-probabilities and entropies, and the reference's."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from rlmod.interfaces import Reference
from rlmod.packing import packs
from rlmod.policy import completion_scores
from rlmod.settings import Batch
from rlmod.types import Rollouts


def scored(
    policy: nn.Module,
    rollouts: Rollouts,
    batch: Batch,
    temperature: float,
    *,
    own: bool = True,
    reference: Reference | None = None,
) -> Rollouts:
    """With pi_old's scores (``own``) where the sampler could not hand them over, and with the reference's, in one sweep."""
    assert rollouts.mask is not None
    own = own and (rollouts.logprobs is None or rollouts.entropy is None)
    if not own and reference is None:
        return rollouts
    logprobs, entropy, referred = (
        torch.zeros(rollouts.mask.shape, dtype=torch.float32, device=rollouts.device) for _ in range(3)
    )
    for rows, micro_batch in swept(rollouts, batch):
        assert micro_batch.mask is not None
        length = micro_batch.mask.shape[1]
        if own:
            logprobs[rows, :length], undecided = completion_scores(policy, micro_batch, temperature)
            assert undecided is not None
            entropy[rows, :length] = undecided
        if reference is not None:
            referred[rows, :length] = reference(policy, micro_batch, temperature) * micro_batch.mask
    if own:
        rollouts = replace(
            rollouts, logprobs=logprobs if rollouts.logprobs is None else rollouts.logprobs, entropy=entropy
        )
    return rollouts if reference is None else replace(rollouts, reference_logprobs=referred)


def swept(rollouts: Rollouts, batch: Batch) -> Iterator[tuple[Tensor, Rollouts]]:
    """All rows once, as many at a time as in a training step, with their indices."""
    for rows in packs(rollouts, batch.micro_batch, batch.micro_batch_tokens):
        yield rows, rollouts.rows(rows).trimmed()
