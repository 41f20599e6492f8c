"""Records of one iteration.

    Problem -> Prompts -> Rollouts (filled stage by stage), with Texts as the reward's view of them

Axes of all tensor shapes in this package:

    R  rows, one completion each; the completions of a prompt are consecutive and share a ``group`` index
    P  prompt tokens, left-padded
    T  completion tokens, right-padded; ``logprobs[i, t]`` belongs to ``completion_ids[i, t]``
    V  vocabulary

Units: log-probabilities and entropies in nats; lengths in tokens, EOS included, padding not.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Message = dict[str, str]
"""One turn of a chat: ``{"role": ..., "content": ...}``."""
Answer = str | tuple[str, ...]
"""The correct answer, or several of which each is correct; an empty tuple if the problem has none."""


def accepted_answers(answer: Answer) -> tuple[str, ...]:
    """Return all correct answers."""
    return (answer,) if isinstance(answer, str) else answer


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt and its correct answer, if it has one."""

    prompt: str | tuple[Message, ...]
    answer: Answer
    source: str
    """File and line of the problem, for error messages: ``train.jsonl:12``."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """All columns of the record, for rewards and guides: the record itself, not a copy."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of tokenized problems, one prompt per row: here R counts prompts."""

    ids: Int[Tensor, "R P"]
    mask: Bool[Tensor, "R P"]
    problems: tuple[Problem, ...]
    padding: bool = False
    """True if the batch only gives this rank as many batches as the others have; its results do not count."""

    def __len__(self) -> int:
        return len(self.problems)

    def pick(self, indices: Sequence[int]) -> "Prompts":
        """Select prompts by index."""
        chosen = list(indices)
        problems = tuple(self.problems[i] for i in chosen)
        return Prompts(ids=self.ids[chosen], mask=self.mask[chosen], problems=problems)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Prompts":
        """Move to a device; Lightning calls this."""
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=non_blocking),
            mask=self.mask.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The reward's view of rollouts: every field has one entry per completion. None means not recorded.

    Recorded completions (``rlmod-eval completions=FILE``) have only ``completions`` and ``answers``.
    """

    completions: Sequence[str]
    answers: Sequence[Answer]
    problems: Sequence[Problem] | None = None
    lengths: Sequence[int] | None = None
    """Length of each completion in tokens, EOS included."""
    truncated: Sequence[bool] | None = None
    """True if the completion hit the token limit before an EOS or a stop string."""
    group: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Completions, one per row, with all tensors that belong to them.

    Every sampler fills the six required fields. The other fields are None until their stage fills them.
    Masks are explicit: True means that a token counts. The first EOS counts, tokens after it do not. A row whose mask is False everywhere
    (from a dropped group in a rollout batch that could not be filled) has weight 0.
    """

    prompt_ids: Int[Tensor, "R P"]
    prompt_mask: Bool[Tensor, "R P"]
    completion_ids: Int[Tensor, "R T"]
    mask: Bool[Tensor, "R T"]
    group: Int[Tensor, " R"]
    """Index of the prompt within the rollout batch; the completions of a group share it."""
    truncated: Bool[Tensor, " R"]
    """True if the completion hit the token limit before an EOS or a stop string."""
    rewards: Float[Tensor, " R"] | None = None
    """The sum of all reward terms."""
    outcomes: Float[Tensor, " R"] | None = None
    """The sum of the reward terms that count for correctness, without length penalties and the like."""
    terms: Mapping[str, Float[Tensor, " R"]] = field(default_factory=dict)
    """The reward's named terms, with their weights: they add up to ``rewards``. Empty if the reward has none. A row from which the reward
    abstained holds the mean of its group."""
    abstained: Bool[Tensor, " R"] | None = None
    """True if the reward has no value for the row. Its mask is False everywhere, so that nothing counts it. ``rewards`` and ``outcomes``
    hold the mean of its group."""
    logprobs: Float[Tensor, "R T"] | None = None
    """Log-probabilities under the policy that sampled the row (pi_old, or the guide), at the sampling temperature, in nats."""
    entropy: Float[Tensor, "R T"] | None = None
    """Entropy of pi_old over the full vocabulary, at the sampling temperature, in nats; without gradient."""
    sampler_logprobs: Float[Tensor, "R T"] | None = None
    """Log-probabilities reported by the sampling engine, in nats."""
    reference_logprobs: Float[Tensor, "R T"] | None = None
    """Log-probabilities under the reference policy, at the sampling temperature, in nats."""
    policy_entropy: Float[Tensor, "R T"] | None = None
    """Entropy of the policy in training, with gradient, in nats; filled only in a training step, and only if a component reads it."""
    from_guide: Bool[Tensor, " R"] | None = None
    """True if the guide sampled the row: an off-policy sample."""
    sub_batch: Int[Tensor, " R"] | None = None
    """Index of the row's sub-batch. Each sub-batch is shaped and normalized separately; 0 is the main one. None: there is only one."""
    advantages: Float[Tensor, "R T"] | None = None
    """Filled by the shaper; 0 where the mask is False."""
    weights: Float[Tensor, "R T"] | None = None
    """Filled by the aggregation, over one optimizer step and all ranks. A mean over tokens or rollouts sums to 1."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of your own components, by name: one entry per row, ``[R]`` or ``[R T]``."""

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def correctness_score(self) -> Float[Tensor, " R"]:
        """The outcomes, or the rewards if there are none. A completion is correct if this number is above the threshold."""
        return require(self.rewards, "rewards") if self.outcomes is None else self.outcomes

    def _filled_fields(self) -> dict[str, Tensor]:
        return {name: value for name in TENSOR_FIELDS if (value := getattr(self, name)) is not None}

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Rollouts":
        mappings = {name: {key: change(value) for key, value in getattr(self, name).items()} for name in MAPPINGS}
        return replace(self, **{name: change(value) for name, value in self._filled_fields().items()}, **mappings)

    @property
    def device(self) -> torch.device:
        return self.mask.device

    def rows(self, index: slice | Tensor) -> "Rollouts":
        """Select rows by a slice, an index or a boolean tensor, in every field."""
        return self._map_tensors(lambda value: value[index])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Rollouts":
        """Move to a device; Lightning calls this."""
        return self._map_tensors(lambda value: value.to(device, non_blocking=non_blocking))

    def trimmed(self) -> "Rollouts":
        """Drop leading prompt columns that are padding in every row, and trailing completion columns that are masked out in every row."""
        length = int(self.mask.any(0).nonzero().max()) + 1 if bool(self.mask.any()) else 1
        changes: dict[str, Tensor] = {n: v[:, :length] for n, v in self._filled_fields().items() if n in TOKEN_FIELDS}
        width = int(self.prompt_mask.sum(1).max()) if len(self) else 1
        changes |= {"prompt_ids": self.prompt_ids[:, -width:], "prompt_mask": self.prompt_mask[:, -width:]}
        extra = {name: value[:, :length] if value.ndim == 2 else value for name, value in self.extra.items()}
        return replace(self, **changes, extra=extra)


def require(value: Tensor | None, name: str) -> Tensor:
    """Return the value of a field. ValueError that names the field if it is None."""
    if value is None:
        raise ValueError(
            f"rollouts.{name} is None: no stage before this one fills it; a component that reads it must name it in `reads`"
        )
    return value


PROMPT_FIELDS = frozenset({"prompt_ids", "prompt_mask"})
ROW_FIELDS = frozenset({"group", "rewards", "outcomes", "truncated", "abstained", "from_guide", "sub_batch"})
MAPPINGS = ("terms", "extra")
"""The fields that hold several tensors by name."""
TENSOR_FIELDS = tuple(f.name for f in fields(Rollouts) if f.name not in MAPPINGS)
TOKEN_FIELDS = frozenset(TENSOR_FIELDS) - PROMPT_FIELDS - ROW_FIELDS
PADDING = {**dict.fromkeys(PROMPT_FIELDS, "left"), **dict.fromkeys(TOKEN_FIELDS, "right")}


def build_rollouts(**values: Any) -> Rollouts:
    """Build a small record for a test or a benchmark. Required fields that are not passed get placeholders.

    Placeholders: one prompt token per row, completion ids of 0, a mask that is True everywhere, one group per row, nothing truncated.
    """
    shapes = [value.shape for name, value in values.items() if name in TOKEN_FIELDS and value is not None]
    rows, length = shapes[0] if shapes else (len(next(iter(values.values()))), 1)
    device = next(iter(values.values())).device
    placeholders = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long, device=device),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.bool, device=device),
        "completion_ids": torch.zeros(rows, length, dtype=torch.long, device=device),
        "mask": torch.ones(rows, length, dtype=torch.bool, device=device),
        "group": torch.arange(rows, device=device),
        "truncated": torch.zeros(rows, dtype=torch.bool, device=device),
    }
    return Rollouts(**{**placeholders, **values})


def concatenate(records: Sequence[Rollouts]) -> Rollouts:
    """Concatenate the rows of several records. Prompts are padded on the left, completions on the right.

    Padding is 0 in every field; the masks are False there.
    An optional field that is None in one of the records is None in the result.
    Group indices do not change; the caller must keep them distinct.
    """

    def stack(values: list[Any], side: str | None) -> Tensor | None:
        if any(value is None for value in values):
            return None
        if side is not None:
            width = max(value.shape[1] for value in values)
            values = [_pad(value, width, side) for value in values]
        return torch.cat(values)

    columns = {name: stack([getattr(record, name) for record in records], PADDING.get(name)) for name in TENSOR_FIELDS}
    extra: dict[str, Tensor] = {}
    for name in records[0].extra:
        values = [record.extra.get(name) for record in records]
        side = "right" if records[0].extra[name].ndim == 2 else None
        if (stacked := stack(values, side)) is not None:
            extra[name] = stacked
    # A record of which no row has a reward has no terms; nothing counts its rows.
    named = dict.fromkeys(name for record in records for name in record.terms)
    terms = {
        name: torch.cat([r.terms.get(name, r.mask.new_zeros(len(r), dtype=torch.float32)) for r in records])
        for name in named
    }
    return Rollouts(**cast(dict[str, Any], columns), extra=extra, terms=terms)


def _pad(value: Tensor, width: int, side: str) -> Tensor:
    missing = width - value.shape[1]
    return torch.nn.functional.pad(value, (missing, 0) if side == "left" else (0, missing))
