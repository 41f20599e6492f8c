"""The records that flow through one iteration.

    Problem -> Prompts -> Rollouts (filled stage by stage), with Texts as the reward's view of them

Axes, as they stand in every shape of this package:

    R  rollouts (rows): one completion each; the rows of a prompt stand together and share a ``group`` index
    P  prompt tokens, left-padded
    T  completion tokens, right-padded; ``logprobs[i, t]`` scores ``completion_ids[i, t]``

Units: log-probabilities and entropies in nats; lengths in tokens, EOS included, padding not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Message = dict[str, str]
"""One turn of a chat: ``{"role": ..., "content": ...}``."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt and the answer that is right."""

    prompt: str | tuple[Message, ...]
    answer: str
    source: str
    """Where it was read, for messages: ``train.jsonl:12``."""
    entry: Mapping[str, Any] | None = None
    """What a task's own scorer needs besides the answer."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of problems, tokenized. Here R counts prompts, one row each."""

    ids: Int[Tensor, "R P"]
    mask: Bool[Tensor, "R P"]
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.problems)

    def pick(self, indices: Sequence[int]) -> "Prompts":
        chosen = list(indices)
        problems = tuple(self.problems[i] for i in chosen)
        return Prompts(ids=self.ids[chosen], mask=self.mask[chosen], problems=problems)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Prompts":
        """Lightning moves a batch with this."""
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=non_blocking),
            mask=self.mask.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a reward reads. All sequences have one entry a rollout; what is None was not recorded.

    Scoring recorded completions knows only ``completions`` and ``answers``.
    """

    completions: Sequence[str]
    answers: Sequence[str]
    problems: Sequence[Problem] | None = None
    lengths: Sequence[int] | None = None
    """Tokens of each completion, EOS included."""
    truncated: Sequence[bool] | None = None
    """Whether the completion hit the token limit before an EOS."""
    group: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Completions and all that is known of them. A field is None until its stage has filled it.

    Masks are explicit: True = counts. The first EOS counts, nothing after it does; a row that is masked out whole (a dropped
    group in a batch that could not be filled) has no weight anywhere.
    """

    prompt_ids: Int[Tensor, "R P"] | None = None
    prompt_mask: Bool[Tensor, "R P"] | None = None
    completion_ids: Int[Tensor, "R T"] | None = None
    mask: Bool[Tensor, "R T"] | None = None
    group: Int[Tensor, " R"] | None = None
    """Index of the prompt within the collection; a group's rows share it."""
    rewards: Float[Tensor, " R"] | None = None
    """After all reward terms."""
    outcomes: Float[Tensor, " R"] | None = None
    """The rewards without penalties for length and the like: what decides whether a completion is correct."""
    logprobs: Float[Tensor, "R T"] | None = None
    """Of the policy that sampled the row (pi_old, or the guide), at the sampling temperature."""
    entropy: Float[Tensor, "R T"] | None = None
    """Over the full vocabulary, of pi_old at the sampling temperature; never with a gradient."""
    sampler_logprobs: Float[Tensor, "R T"] | None = None
    """As the sampling engine reported them."""
    reference_logprobs: Float[Tensor, "R T"] | None = None
    """Of the reference policy, at the sampling temperature."""
    policy_entropy: Float[Tensor, "R T"] | None = None
    """Of the policy as it is being trained, with its gradient; only in a training step, and only if a penalty needs it."""
    truncated: Bool[Tensor, " R"] | None = None
    """Hit the token limit before an EOS."""
    from_guide: Bool[Tensor, " R"] | None = None
    zero_reward: Bool[Tensor, " R"] | None = None
    """In the batch of its own of prompts that the policy alone failed on."""
    advantages: Float[Tensor, "R T"] | None = None
    """Filled by the shaper; 0 where the mask is False."""
    weights: Float[Tensor, "R T"] | None = None
    """Filled by the aggregation; they sum to 1 over one optimizer step and all ranks (see rlmod/aggregation)."""

    def __len__(self) -> int:
        return next(len(value) for value in self._filled().values())

    @property
    def correctness_score(self) -> Float[Tensor, " R"]:
        """What is compared with a threshold to tell right from wrong: the outcomes, or the rewards where there are none."""
        correctness_score = self.rewards if self.outcomes is None else self.outcomes
        assert correctness_score is not None
        return correctness_score

    def _filled(self) -> dict[str, Tensor]:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @property
    def device(self) -> torch.device:
        return next(value.device for value in self._filled().values())

    def rows(self, index: slice | Tensor) -> "Rollouts":
        """The rows that a slice, an index or a boolean tensor picks, in every field."""
        return replace(self, **{name: value[index] for name, value in self._filled().items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Rollouts":
        """Lightning moves a batch with this."""
        return replace(self, **{n: v.to(device, non_blocking=non_blocking) for n, v in self._filled().items()})

    def trimmed(self) -> "Rollouts":
        """Without the columns that are padding in every row. A column that only masked-out tokens use goes too."""
        changes: dict[str, Tensor] = {}
        if self.mask is not None:
            length = int(self.mask.any(0).nonzero().max()) + 1 if bool(self.mask.any()) else 1
            changes |= {n: v[:, :length] for n, v in self._filled().items() if n in TOKEN_FIELDS}
        if self.prompt_ids is not None and self.prompt_mask is not None:
            width = int(self.prompt_mask.sum(1).max())
            changes |= {"prompt_ids": self.prompt_ids[:, -width:], "prompt_mask": self.prompt_mask[:, -width:]}
        return replace(self, **changes)


PROMPT_FIELDS = frozenset({"prompt_ids", "prompt_mask"})
ROW_FIELDS = frozenset({"group", "rewards", "outcomes", "truncated", "from_guide", "zero_reward"})
TOKEN_FIELDS = frozenset(f.name for f in fields(Rollouts)) - PROMPT_FIELDS - ROW_FIELDS
PADDING = {**dict.fromkeys(PROMPT_FIELDS, "left"), **dict.fromkeys(TOKEN_FIELDS, "right")}


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """Stacks rollouts of different lengths, prompts padded on the left, completions on the right.

    Padding is 0 in every field: under the masks it is never read.
    Group indices are taken over as they are; the caller keeps them distinct.
    """

    def stacked(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if any(value is None for value in values):
            return None
        if name in PADDING:
            width = max(value.shape[1] for value in values)
            values = [_padded(value, width, PADDING[name]) for value in values]
        return torch.cat(values)

    return Rollouts(**{f.name: stacked(f.name) for f in fields(Rollouts)})


def _padded(value: Tensor, width: int, side: str) -> Tensor:
    missing = width - value.shape[1]
    return torch.nn.functional.pad(value, (missing, 0) if side == "left" else (0, missing))
