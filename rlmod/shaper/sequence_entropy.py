"""GRPO-S: rewards shaped per completion by the mean entropy of the policy that sampled it.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from rlmod.ops import masked_mean
from rlmod.shaper import _entropy
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class SequenceEntropy:
    """r+ of a correct completion i (correctness score > threshold) and r- of an incorrect one j, with Hbar_i = mean_t H_{i,t}:

        r+_i = b1 r_i       + b2 n Hbar_i / sum_{k correct} Hbar_k
        r-_j = b1 (p_j - 1) - b2 m (1/Hbar_j) / sum_{k incorrect} (1/Hbar_k)

    p_j is the completion's penalty, its reward minus its correctness score. The sums run over the group, or with ``entropy_scope: batch``
    over the rollout batch of all ranks; n and m count the two classes there. A is normalized over the group as in GRPO, with the
    statistics that ``normalization`` selects (see TokenEntropy), and is the same for every token of a completion. Use it with
    loss=sequence_surrogate and aggregation=rollout_mean.

    Source: GTPO, arXiv:2508.04349 (v6), eq. 8, 9; ``mean="geometric"``: App. C, Hbar_i = (prod_t H_{i,t})^(1/|o_i|) and
    denominators (prod Hbar)^(1/n). Defaults b1 = 1, b2 = 0.1: sec. 3.1 (0.2 hurts).
    Differs: [D] The penalty of an incorrect completion, and ``entropy_scope``: see TokenEntropy. [D] ``normalization``. [D] Entropies
    below 1e-6 count as 1e-6. [D] ``entropy_clip`` clips H before the mean. [D] The std has ddof 1 and eps 1e-6.
    Degenerate: b2 = 0 gives GRPO's z-score (shaper=uniform) for rewards of 0 and 1; so do equal entropies. A group of one class
    has no signal: advantage 0.
    Reads: rewards, outcomes, group, mask, entropy.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "outcomes", "group", "mask", "entropy"})
    min_group_size: ClassVar[int] = 2

    beta1: float = 1.0
    beta2: float = 0.1
    normalization: _entropy.Normalization = "zero_inclusive"
    entropy_clip: Sequence[float] | None = None
    """[low, high] in nats."""
    mean: _entropy.Mean = "arithmetic"
    entropy_scope: Literal["group", "batch"] = "group"
    threshold: float = 0.5
    """A completion is correct if its correctness score is above this."""
    eps: float = 1e-6
    """Added to the std."""

    def __post_init__(self) -> None:
        _entropy.check_fields(
            ("beta1", self.beta1), ("beta2", self.beta2), self.normalization, self.mean, self.entropy_clip, self.eps
        )
        _entropy.check_scope(self.entropy_scope, ("group", "batch"))

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        positive, negative, classes = self.shape_rewards(rollouts)
        per_row = _entropy.normalize_shaped_rewards(
            positive, negative, classes, normalization=self.normalization, eps=self.eps
        )
        return per_row * rollouts.mask

    def shape_rewards(self, rollouts: Rollouts) -> tuple[Float[Tensor, "R 1"], Float[Tensor, "R 1"], _entropy.Classes]:
        """Return r+ and r- (each 0 on the other class, and on groups without signal), and the classes."""
        assert rollouts.rewards is not None
        assert rollouts.entropy is not None
        counted = rollouts.mask.any(1, keepdim=True)
        classes = _entropy.Classes.from_outcomes(rollouts.correctness_score, rollouts.group, counted, self.threshold)
        entropy = _entropy.clip_entropy(rollouts.entropy, self.entropy_clip)
        if self.mean == "arithmetic":
            mean_entropy = masked_mean(entropy, rollouts.mask, dim=1)
        else:
            mean_entropy = masked_mean(entropy.log(), rollouts.mask, dim=1).exp()
        positive, negative = _entropy.shape_rewards(
            rollouts.rewards, rollouts.correctness_score, mean_entropy[:, None], classes, base=self.beta1, bonus=self.beta2,
            mean=self.mean, scope=self.entropy_scope,
        )  # fmt: skip
        return positive, negative, classes
