"""GTPO: rewards shaped per token by the entropy of the policy that sampled it.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from rlmod.shaper import _entropy
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class TokenEntropy:
    """r+ at token t of a correct completion i (correctness score > threshold), and r- at token t of an incorrect one j:

        r+_{i,t} = a1 r_i       + a2 d_t H_{i,t} / sum_{k correct} H_{k,t}
        r-_{j,t} = a1 (p_j - 1) - a2 h_t (1/H_{j,t}) / sum_{k incorrect} (1/H_{k,t})

    p_j is the completion's penalty, its reward minus its correctness score. The sums run over the group's completions of the same class
    that are at least t tokens long; d_t and h_t count them. ``entropy_scope`` chooses the cells of the sums:

        group     position t of the group (eq. 3 and 5)
        batch     position t of all groups of the rollout batch, over all ranks
        row       all tokens of the completion
        matrix    all tokens of the group

    Then
    A+ = (r+ - mean R+) / std R+, and A- from r- in the same way, with the statistics over the whole batch or the group (``scope``):

        zero_inclusive  over every counted token, where r+ is 0 on the incorrect and r- on the correct completions
        joint           one set over r+ + r-
        own_class       over the tokens of the class only

    Source: GTPO, arXiv:2508.04349 (v6), eq. 3, 5, 6; ``mean="geometric"``: App. C, where the denominators are
    (prod H)^(1/d_t) and (prod 1/H)^(1/h_t), without the factors d_t, h_t. Defaults a1 = 1, a2 = 0.1: sec. 3.1.
    Differs: [D] The penalty of an incorrect completion, because eq. 5 knows binary rewards only; a1 scales it, as it scales a correct
    one's. [D] ``entropy_scope: batch`` is our reading of sec. 4, "operates at the batch level"; ``row`` and ``matrix`` are named there as
    future work, and ``matrix`` is over the group here. Groups without signal are in no sum. [D] ``normalization`` and ``scope``: the
    paper says both "over all tokens in the entire batch" and "in the group", and does not say whether R+ includes the zeros. Props 2.3
    and B.4 need the default. [D] Entropies below 1e-6 count as 1e-6 (no division by 0). [D] ``entropy_clip`` clamps H first. Sec. 3.1
    says that entropy is clipped at 0.2 and 0.28, which may also mean the bounds of the ratio, 0.2 and 0.28 in DAPO. Clamped H have few
    values: where all of a class are on one bound, nothing is shaped (shaper/spread_within). [D] The std has ddof 1 and eps 1e-6.
    Degenerate: a2 = 0 gives token-mean GRPO with the baseline sum |o| r / sum |o|. Equal entropies shape uniformly. The only class
    member left at t has r+ = a1 r + a2. A group of one class has no signal: its advantage is 0, and it is excluded from the
    statistics of the batch, so that dropping it changes nothing [D].
    Reads: rewards, outcomes, group, mask, entropy.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "outcomes", "group", "mask", "entropy"})
    min_group_size: ClassVar[int] = 2
    granularity: ClassVar[Literal["token", "sequence"]] = "token"

    alpha1: float = 1.0
    alpha2: float = 0.1
    normalization: _entropy.Normalization = "zero_inclusive"
    scope: Literal["batch", "group"] = "batch"
    entropy_clip: Sequence[float] | None = None
    """[low, high] in nats."""
    mean: _entropy.Mean = "arithmetic"
    entropy_scope: _entropy.EntropyScope = "group"
    threshold: float = 0.5
    """A completion is correct if its correctness score is above this."""
    eps: float = 1e-6
    """Added to the std."""

    def __post_init__(self) -> None:
        _entropy.check_fields(
            ("alpha1", self.alpha1), ("alpha2", self.alpha2), self.normalization, self.mean, self.entropy_clip, self.eps
        )
        _entropy.check_scope(self.entropy_scope, get_args(_entropy.EntropyScope))
        if self.scope not in ("batch", "group"):
            raise ValueError(f"shaper.scope must be batch or group, got {self.scope!r}")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        positive, negative, classes = self.shape_rewards(rollouts)
        over_batch = self.scope == "batch"
        return _entropy.normalize_shaped_rewards(
            positive,
            negative,
            classes.pool_groups() if over_batch else classes,
            normalization=self.normalization,
            eps=self.eps,
            over_ranks=over_batch,
        )

    def shape_rewards(self, rollouts: Rollouts) -> tuple[Float[Tensor, "R T"], Float[Tensor, "R T"], _entropy.Classes]:
        """Return r+ and r- (each 0 on the other class, and on groups without signal), and the classes."""
        assert rollouts.rewards is not None
        assert rollouts.entropy is not None
        classes = _entropy.Classes.from_outcomes(
            rollouts.correctness_score, rollouts.group, rollouts.mask, self.threshold
        )
        entropy = _entropy.clip_entropy(rollouts.entropy, self.entropy_clip)
        positive, negative = _entropy.shape_rewards(
            rollouts.rewards, rollouts.correctness_score, entropy, classes, base=self.alpha1, bonus=self.alpha2, mean=self.mean,
            scope=self.entropy_scope,
        )  # fmt: skip
        return positive, negative, classes
