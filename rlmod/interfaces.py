"""The Protocol of each swappable component, in the order in which data passes through them.

    prompts -> sampler -> guide -> reward -> filter -> logprob pass -> reference
            -> shaper -> correction -> aggregation -> loss -> regularizer -> optimizer

A component is any callable with the signature of its stage. It inherits nothing and needs no registration. rlmod's components are frozen,
keyword-only dataclasses whose fields are their YAML keys. A component of your own may be a plain function; its declarations are then
attributes of the function.

**Declarations.** A component declares, as class attributes, what the framework must know about it. ``declared(component, name)``
reads a declaration, and ``DEFAULTS`` holds the default of each:

    reads                      the fields of Rollouts that the component reads; default: all of them
    granularity                "token" or "sequence": the advantages that a shaper or correction returns, or that a loss accepts
    max_generation_batches     batches of prompts that a filter may request per rollout batch, refills included; default 1: no refill
    min_group_size             the smallest number of completions per prompt for which a shaper can return advantages other than 0
    accepts_penalties          False if a shaper cannot use a reward with terms that do not count for correctness, such as a length penalty
    proportional_to_advantage  True if a loss is 0 where the advantage is 0, so completions without advantage need no forward pass
    counts_for_correctness     True if a reward tells correct from incorrect completions (a length penalty does not)
    pointwise                  True if a reward scores each completion independently and may run in a thread during sampling
    skip_special_tokens        True if a reward reads texts without any special token
    needs_answer               True if a reward compares with the answer, so that a problem without one is an error

``reads`` decides whether pi_old's log-probabilities and entropies are computed before the training step, whether a reference is needed,
and whether the training forward pass has to return the policy's entropy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlmod.types import MAPPINGS, TENSOR_FIELDS, Problem, Prompts, Rollouts, Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Granularity = Literal["token", "sequence"]

ALL_FIELDS = frozenset((*TENSOR_FIELDS, *MAPPINGS))
"""The fields of Rollouts. A component that does not declare ``reads`` is taken to read all of them."""

DEFAULTS: dict[str, Any] = {
    "reads": ALL_FIELDS,
    "granularity": "sequence",
    "max_generation_batches": 1,
    "min_group_size": 1,
    "accepts_penalties": True,
    "proportional_to_advantage": False,
    "counts_for_correctness": True,
    "pointwise": False,
    "skip_special_tokens": False,
    "needs_answer": False,
}
"""The values for components that do not declare them."""

LOSS_GRANULARITY: Granularity = "token"
"""The default of a loss: it accepts advantages that vary over the tokens of a completion."""


def unwrap(component: object) -> object:
    """Return the function inside a partial, because the function carries the declarations."""
    return unwrap(component.func) if isinstance(component, partial) else component


def component_name(component: object) -> str:
    """Return the name of the component's class or function."""
    target = unwrap(component)
    return getattr(target, "__qualname__", type(target).__qualname__)


def declared(component: object, name: str) -> Any:
    """Return a component's declaration ``name``, or its default."""
    return getattr(unwrap(component), name, DEFAULTS[name])


def check_declarations(component: object, key: str) -> None:
    """Raise ValueError for a misspelt declaration or an invalid value. ``key`` is the component's config key."""
    import difflib

    target = unwrap(component)
    own = [name for name in dir(target) if not name.startswith("_")]
    for name in own:
        swapped = [right for right in DEFAULTS if sorted(right) == sorted(name)]
        close = swapped or difflib.get_close_matches(name, DEFAULTS, n=1, cutoff=0.85)
        if close and name not in DEFAULTS and close[0] not in own:
            raise ValueError(
                f"{key}: {component_name(target)} declares {name}; did you mean {close[0]}? Declarations are {', '.join(DEFAULTS)}"
            )
    if not isinstance(getattr(target, "reads", ALL_FIELDS), frozenset | set):
        raise ValueError(
            f"{key}: {component_name(target)}.reads must be a frozenset of fields of Rollouts, as in frozenset({{'rewards'}}), "
            f"got {declared(component, 'reads')!r}"
        )
    if unknown := sorted(set(declared(component, "reads")) - ALL_FIELDS):
        close = difflib.get_close_matches(unknown[0], ALL_FIELDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{key}: {component_name(target)}.reads names {unknown[0]!r}, which is not a field of Rollouts{hint}; "
            f"the fields are {', '.join(sorted(ALL_FIELDS))}"
        )
    if declared(component, "granularity") not in ("token", "sequence"):
        raise ValueError(
            f"{key}: {component_name(target)}.granularity must be 'token' or 'sequence', got {declared(component, 'granularity')!r}"
        )
    for name in ("min_group_size", "max_generation_batches"):
        value = declared(component, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{key}: {component_name(target)}.{name} must be a whole number of at least 1, got {value!r}"
            )
    for name in (
        "accepts_penalties",
        "proportional_to_advantage",
        "counts_for_correctness",
        "pointwise",
        "skip_special_tokens",
        "needs_answer",
    ):
        if not isinstance(value := declared(component, name), bool):
            raise ValueError(f"{key}: {component_name(target)}.{name} must be True or False, got {value!r}")


@runtime_checkable
class Problems(Protocol):
    def __call__(self) -> Sequence[Problem]:
        """Return the problems of a set, in a fixed order."""
        ...


OnFinished = Callable[[Rollouts, Int[Tensor, " n"]], None]
"""Called when completions finish, once per completion, with their indices in the final batch."""


@runtime_checkable
class Sampler(Protocol):
    # Properties, so that fields of a frozen dataclass satisfy the Protocol. The policy is Any: a sampler may accept its own kind of model.
    @property
    def completions_per_prompt(self) -> int: ...
    @property
    def temperature(self) -> float: ...

    def __call__(self, policy: Any, prompts: Prompts, seed: int) -> Rollouts:
        """Sample ``completions_per_prompt`` completions per prompt; those of prompt i have ``group`` i.

        Fill the six required fields, and ``logprobs``, ``entropy`` and ``sampler_logprobs`` if the engine returns them. The same seed and
        weights give the same completions. A sampler that also accepts ``on_finished: OnFinished | None`` (``StreamingSampler``) reports
        completions while it samples the others, so that pointwise rewards are computed during sampling.
        """
        ...


@runtime_checkable
class StreamingSampler(Protocol):
    """A sampler that reports finished completions while it samples the others."""

    def __call__(self, policy: Any, prompts: Prompts, seed: int, on_finished: OnFinished | None = None) -> Rollouts: ...


@runtime_checkable
class WeightSyncedSampler(Sampler, Protocol):
    """A sampler with a separate engine, which needs the policy's weights."""

    @property
    def max_difference(self) -> float:
        """Allowed mean difference between the engine's and the policy's log-probabilities over the tokens of a rollout batch, in nats."""
        ...

    def sync(self, policy: Any) -> None:
        """Copy the weights to the engine. Called on every rank before each rollout batch and each validation, with the full policy."""
        ...

    def sleep(self) -> None:
        """Release memory that is not needed until the next sync."""
        ...


def sync(sampler: Sampler, policy: nn.Module) -> None:
    """Copy the policy's weights to the sampler's engine, if it has one."""
    if isinstance(sampler, WeightSyncedSampler):
        sampler.sync(policy)


def sleep(sampler: Sampler) -> None:
    """Release memory of the sampler's engine, if it has one."""
    if isinstance(sampler, WeightSyncedSampler):
        sampler.sleep()


@runtime_checkable
class Guide(Protocol):
    """An expert policy whose completions are off-policy samples."""

    completions_per_prompt: int
    """Completions added to every prompt's on-policy ones; 0: the guide is used for the zero-reward batch only."""

    def __call__(self, prompts: Prompts, completions_per_prompt: int, seed: int) -> Rollouts:
        """Return ``completions_per_prompt`` completions per prompt; those of prompt i have ``group`` i.

        Fill the same fields as a sampler, except for ``entropy``, which is pi_old's; ``logprobs`` is the denominator of the ratio.
        """
        ...


@runtime_checkable
class PromptGuide(Protocol):
    """A guide that helps with the prompt. The policy completes it, so its completions are on-policy; only the zero-reward batch uses it."""

    @property
    def completions_per_prompt(self) -> int:
        """0"""
        ...

    @property
    def attempts(self) -> int:
        """Number of guided prompts that each problem may get, from the least help to the most."""
        ...

    def can_guide(self, problem: Problem) -> bool:
        """Return False for a problem that the guide knows nothing about."""
        ...

    def guided_prompts(self, prompts: Prompts, attempt: int) -> Prompts:
        """Return a prompt with help for each of these problems, in their order."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Declares ``counts_for_correctness``, ``pointwise``, ``skip_special_tokens`` and ``needs_answer``."""

    def __call__(self, texts: Texts) -> Any:
        """Return one number per completion, or a mapping of named terms whose sum is the reward.

        The numbers are a sequence or a tensor with one entry per row. None in a sequence: the reward abstains, and the completion is left
        out of its group. A reward may also return ``RewardResult`` (rlmod/reward/_failures.py), which tells on which completions it failed.
        """
        ...


@runtime_checkable
class PointwiseReward(Reward, Protocol):
    """A reward that scores each completion independently, so that it may run in a thread while others are sampled.

    The reward of one completion must not depend on other completions. The reward must not use the process's random generators, because
    sampling uses them at the same time.
    """

    pointwise: bool


@runtime_checkable
class AnswerReader(Protocol):
    """A reward that may be unable to read a problem's answer, such as one that parses it as mathematics."""

    def find_unreadable(self, problems: Sequence[Problem]) -> Mapping[int, str]:
        """Return the answer that cannot be read, with the reason, by the index of its problem. Called before anything is sampled."""
        ...


@runtime_checkable
class FinalAnswerReader(Protocol):
    """A reward that says which answer a completion gives, so that the completions of a problem can vote (maj@k)."""

    def final_answers(self, completions: Sequence[str]) -> Sequence[str | None]:
        """Return the final answer of each completion; None without one. Two completions vote for one answer if these texts are equal."""
        ...


@runtime_checkable
class Filter(Protocol):
    """Selects the groups to train on. Declares ``max_generation_batches``."""

    def __call__(self, rollouts: Rollouts) -> Bool[Tensor, " groups"]:
        """Return True for each group to train on.

        ``rollouts.group`` numbers the groups from 0 without gaps; rewards and outcomes are filled.
        """
        ...


@runtime_checkable
class Reference(Protocol):
    def __call__(self, policy: nn.Module, rollouts: Rollouts, temperature: float) -> Float[Tensor, "R T"]:
        """Return log pi_ref of each completion token, in nats, of softmax(logits / temperature)."""
        ...


@runtime_checkable
class MovingReference(Reference, Protocol):
    """A reference whose weights follow the policy. They are saved in the run's checkpoint."""

    def update(self, policy: nn.Module) -> None:
        """Called after every iteration, on every rank; the weights may be DTensors."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@runtime_checkable
class Shaper(Protocol):
    """Declares ``reads``, ``granularity``, ``min_group_size`` and ``accepts_penalties``."""

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        """Return the advantage of every token; 0 where ``rollouts.mask`` is False. The rollouts hold complete groups."""
        ...


@runtime_checkable
class Correction(Protocol):
    """Declares ``reads`` and ``granularity``."""

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with changed advantages or a smaller mask; advantages stay 0 where the mask is False."""
        ...


@runtime_checkable
class Aggregation(Protocol):
    """Declares ``reads``."""

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        """Return the weight of every token of one optimizer step, over all ranks; 0 where ``rollouts.mask`` is False."""
        ...


Metric = Float[Tensor, "..."] | float
"""A value per token (NaN for tokens without one), a 0-d tensor, or a float."""


@runtime_checkable
class Loss(Protocol):
    """Declares ``reads``, ``granularity`` and ``proportional_to_advantage``."""

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Any]]:
        """Return the loss per token, and metrics by name.

        ``logprobs`` are the policy's, with gradient. The step's loss is ``(per_token * rollouts.weights).sum()``. The logged value of a
        metric is its mean over the tokens under the mask of the whole step; the split into micro-batches does not change it.
        """
        ...


@runtime_checkable
class AdaptiveRegularizer(Loss, Protocol):
    """A regularizer whose coefficient changes from step to step. Its state is saved in the run's checkpoint."""

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Called on every rank after each optimizer step, with the means of its metrics over the step's tokens on all ranks.

        It is not called after a step that is skipped because its gradient is not finite, nor after one in which no token counts.
        """
        ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class SupportsPrepare(Protocol):
    """A component that checks the problems or loads its own weights.

    ``prepare`` is called once, after the problems are read and before the policy's weights are loaded.
    """

    def prepare(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None: ...


def prepare(components: Iterable[object], problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Call ``prepare`` of every component that has it."""
    for component in components:
        if isinstance(component, SupportsPrepare):
            component.prepare(problems, tokenizer)


Regularizer = Loss
"""Added to the loss per token, with the same weights; its coefficient is its own field ``weight``."""
Optimizer = Callable[..., object]
"""A partial of a torch optimizer, called with the parameters."""
Schedule = Callable[..., object]
"""A partial of a learning-rate schedule, called with the optimizer, and with ``num_training_steps`` if it has that argument."""
