"""Forward passes over a whole rollout batch, without gradients: pi_old's log-probabilities and entropies, and the reference's."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from rlmod.interfaces import Reference
from rlmod.model.logprobs import logprobs_and_entropy
from rlmod.model.packing import pack_by_length
from rlmod.types import Rollouts


def logprob_pass(
    policy: nn.Module,
    rollouts: Rollouts,
    temperature: float,
    *,
    rows: int,
    tokens: int | None = None,
    pi_old: bool = True,
    reference: Reference | None = None,
) -> Rollouts:
    """Fill pi_old's log-probabilities and entropies if they are missing (``pi_old``), and the reference's, in one pass over the rows."""
    pi_old = pi_old and (rollouts.logprobs is None or rollouts.entropy is None)
    if not pi_old and reference is None:
        return rollouts
    logprobs, entropy, referred = (
        torch.zeros(rollouts.mask.shape, dtype=torch.float32, device=rollouts.device) for _ in range(3)
    )
    for index, micro_batch in iter_micro_batches(rollouts, rows, tokens):
        length = micro_batch.mask.shape[1]
        if pi_old:
            logprobs[index, :length], undecided = logprobs_and_entropy(policy, micro_batch, temperature)
            assert undecided is not None
            entropy[index, :length] = undecided
        if reference is not None:
            referred[index, :length] = reference(policy, micro_batch, temperature) * micro_batch.mask
    if pi_old:
        rollouts = replace(
            rollouts, logprobs=logprobs if rollouts.logprobs is None else rollouts.logprobs, entropy=entropy
        )
    return rollouts if reference is None else replace(rollouts, reference_logprobs=referred)


def iter_micro_batches(rollouts: Rollouts, rows: int, tokens: int | None = None) -> Iterator[tuple[Tensor, Rollouts]]:
    """All rows once, as many at a time as in a training step, with their indices."""
    for index in pack_by_length(rollouts, rows, tokens):
        yield index, rollouts.rows(index).trimmed()
