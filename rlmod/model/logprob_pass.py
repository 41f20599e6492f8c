"""Forward passes over a rollout batch, without gradients: log-probabilities and entropies of pi_old, log-probabilities of the reference."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from rlmod.contracts import check_per_token, name_component_on_error
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
    """Fill pi_old's log-probabilities and entropies, and the reference's log-probabilities, in one loop over the micro-batches.

    log pi(o_{i,t} | q, o_{i,<t}) of softmax(logits / temperature), and its entropy, both in nats; 0 where ``rollouts.mask`` is False.

    pi_old's are computed if ``pi_old`` is True and at least one of the two is missing; log-probabilities that the sampler filled are kept.
    The reference's are computed if ``reference`` is given. ``rows`` and ``tokens`` limit a micro-batch, as in ``pack_by_length``.
    """
    pi_old = pi_old and (rollouts.logprobs is None or rollouts.entropy is None)
    if not pi_old and reference is None:
        return rollouts
    logprobs, entropy, reference_logprobs = (
        torch.zeros(rollouts.mask.shape, dtype=torch.float32, device=rollouts.device) for _ in range(3)
    )
    for index, micro_batch in iter_micro_batches(rollouts, rows, tokens):
        length = micro_batch.mask.shape[1]
        if pi_old:
            logprobs[index, :length], micro_batch_entropy = logprobs_and_entropy(policy, micro_batch, temperature)
            assert micro_batch_entropy is not None
            entropy[index, :length] = micro_batch_entropy
        if reference is not None:
            with name_component_on_error("reference", reference):
                found = check_per_token(
                    reference(policy, micro_batch, temperature), micro_batch, "reference", reference
                )
            reference_logprobs[index, :length] = found * micro_batch.mask
    if pi_old:
        rollouts = replace(
            rollouts, logprobs=logprobs if rollouts.logprobs is None else rollouts.logprobs, entropy=entropy
        )
    return rollouts if reference is None else replace(rollouts, reference_logprobs=reference_logprobs)


def iter_micro_batches(rollouts: Rollouts, rows: int, tokens: int | None = None) -> Iterator[tuple[Tensor, Rollouts]]:
    """Yield micro-batches of the size that training uses, with the indices of their rows. Every row is in exactly one."""
    for index in pack_by_length(rollouts, rows, tokens):
        yield index, rollouts.rows(index).trimmed()
