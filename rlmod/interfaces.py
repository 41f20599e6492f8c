"""What each swappable component must be callable as, in the order of the data.

    prompts -> sampler -> guide -> reward -> filter -> logprob pass -> reference
            -> shaper -> correction -> aggregation -> loss -> regularizer -> optimizer

A component is any callable of the right shape: there is nothing to inherit and nothing to register. Ours are frozen, keyword-only
dataclasses whose fields are their YAML keys; yours may be a plain function.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from rlmod.types import Problem, Prompts, Rollouts, Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class Problems(Protocol):
    def __call__(self) -> list[Problem]:
        """The problems of a set, in a fixed order."""
        ...


OnFinished = Callable[[Rollouts, Int[Tensor, " n"]], None]
"""Is told of rows that have ended, and of their places among all rows that the sampler is going to return; of no row twice."""


@runtime_checkable
class Sampler(Protocol):
    completions_per_prompt: int
    temperature: float

    def __call__(self, policy: nn.Module, prompts: Prompts, seed: int) -> Rollouts:
        """``completions_per_prompt`` rows a prompt, the rows of prompt i with ``group`` i.

        Fills prompt_ids, prompt_mask, completion_ids, mask, group, truncated; and, where the engine can hand them
        over, logprobs, entropy and sampler_logprobs. The same seed and weights give the same rows.

        One that takes ``finished: OnFinished | None`` besides tells it of rows that have ended while it goes on with the others: rewards
        are then worked out beside sampling.
        """
        ...


@runtime_checkable
class WeightSyncedSampler(Sampler, Protocol):
    """A sampler with an engine of its own, which has to be handed the policy's weights."""

    max_difference: float
    """Nats that its log-probabilities may be apart from the policy's, in the mean over the tokens of a collection."""

    def sync(self, policy: nn.Module) -> None:
        """Called on every rank before each collection and each validation, with the whole policy."""
        ...

    def sleep(self) -> None:
        """Called when nothing will be sampled before the next sync."""
        ...


def sync(sampler: Sampler, policy: nn.Module) -> None:
    if isinstance(sampler, WeightSyncedSampler):
        sampler.sync(policy)


def sleep(sampler: Sampler) -> None:
    if isinstance(sampler, WeightSyncedSampler):
        sampler.sleep()


@runtime_checkable
class Guide(Protocol):
    completions_per_prompt: int
    """That join every prompt's own; 0: the guide serves the zero-reward batch alone."""

    def __call__(self, prompts: Prompts, completions_per_prompt: int, seed: int) -> Rollouts:
        """``completions_per_prompt`` rows a prompt, the rows of prompt i with ``group`` i.

        Fills what a sampler does but ``entropy``, which is pi_old's; ``logprobs`` are what the ratio divides by.
        """
        ...


@runtime_checkable
class Reward(Protocol):
    def __call__(self, texts: Texts) -> Sequence[float] | Float[Tensor, " R"] | Mapping[str, Sequence[float]]:
        """One number a rollout, or a mapping of named terms whose sum is the reward.

        A reward that says ``pointwise: ClassVar[bool] = True`` (a function: as its attribute) is asked about
        some completions, in a thread of its own, while others are sampled: what it says of one must not depend on
        others, nor may it draw from the process's random generators, from which sampling draws.
        """
        ...


def function_of(component: object) -> object:
    """What a partial was made of: attributes are the function's."""
    return function_of(component.func) if isinstance(component, partial) else component


@runtime_checkable
class Reference(Protocol):
    def __call__(self, policy: nn.Module, rollouts: Rollouts, temperature: float) -> Float[Tensor, "R T"]:
        """log pi_ref of each completion token, in nats, of softmax(logits / temperature)."""
        ...


@runtime_checkable
class MovingReference(Reference, Protocol):
    """A reference that follows the policy, and whose weights are in the run's checkpoint."""

    def update(self, policy: nn.Module) -> None:
        """Called after every collection has been trained on, on every rank; the weights may be DTensors."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@runtime_checkable
class Shaper(Protocol):
    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        """The advantage of every token, over whole groups; 0 where ``rollouts.mask`` is False."""
        ...


@runtime_checkable
class Correction(Protocol):
    def __call__(self, rollouts: Rollouts) -> Rollouts:
        """The shaped rollouts with other advantages or a smaller mask; advantages stay 0 where the mask is False."""
        ...


@runtime_checkable
class Aggregation(Protocol):
    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        """The weight of every token of one optimizer step, over all ranks; 0 where ``rollouts.mask`` is False."""
        ...


@runtime_checkable
class Loss(Protocol):
    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "..."]]]:
        """The loss of every token, and metrics: a value of every token, NaN where a token has none, or one number for all.

        What is logged is the mean over the counted tokens of the whole step, however it is cut into micro-batches. ``logprobs``
        are the policy's, with gradient. The step's loss is ``(per_token * rollouts.weights).sum()``. A loss that says
        ``proportional_to_advantage: ClassVar[bool] = True`` is spared the rows whose advantages are all 0.
        """
        ...


@runtime_checkable
class SupportsPrepare(Protocol):
    """What any component may have besides: checks that need the problems, and weights of its own to load.

    Called once, after the problems are read and before the policy's weights are.
    """

    def prepare(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None: ...


def prepare(components: Iterable[object], problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None:
    for component in components:
        if isinstance(component, SupportsPrepare):
            component.prepare(problems, tokenizer)


Regularizer = Loss
"""Added to the loss token by token, under the same weights; its own weight is its own field."""
Optimizer = Callable[..., object]
"""A partial of a torch optimizer: called with the parameters."""
Schedule = Callable[..., object]
"""A partial of a learning-rate schedule: called with the optimizer, and ``num_training_steps`` where it takes it."""
