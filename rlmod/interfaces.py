"""The Protocol of each swappable component, in the order of the data.

    prompts -> sampler -> guide -> reward -> filter -> logprob pass -> reference
            -> shaper -> correction -> aggregation -> loss -> regularizer -> optimizer

A component is any callable of the right signature: nothing to inherit, nothing to register. Ours are frozen, keyword-only
dataclasses whose fields are their YAML keys. Yours may be a plain function; then a declaration is an attribute of the function.

**Declarations.** What the frame must know of a component, the component declares, as a class attribute. ``declared(component, name)`` is
the one place that reads a declaration, and ``DEFAULTS`` holds the default of each:

    reads                      the fields of Rollouts that it looks at; default: all of them
    granularity                "token" or "sequence"; shaper and correction: how finely their advantages vary; loss: what it takes
    max_generation_batches     batches of prompts that a filter may ask for per rollout batch, refills included; default 1: no refill
    min_group_size             the fewest completions per prompt with which a shaper gives anything but 0
    proportional_to_advantage  a loss is 0 where the advantage is 0, so completions without advantage need no forward pass
    counts_for_correctness     whether a reward says something about correct and incorrect (a length penalty does not)
    pointwise                  whether a reward looks at each completion alone and may run in a thread beside sampling

``reads`` decides whether pi_old's log-probabilities and entropies are computed before the training step, whether a reference is needed,
and whether the training forward pass has to give the policy's entropy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlmod.types import TENSOR_FIELDS, Problem, Prompts, Rollouts, Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Granularity = Literal["token", "sequence"]

ALL_FIELDS = frozenset(TENSOR_FIELDS) | {"extra"}
"""The fields of Rollouts. A component that does not declare ``reads`` is taken to read all of them."""

DEFAULTS: dict[str, Any] = {
    "reads": ALL_FIELDS,
    "granularity": "sequence",
    "max_generation_batches": 1,
    "min_group_size": 1,
    "proportional_to_advantage": False,
    "counts_for_correctness": True,
    "pointwise": False,
}
"""The value for a component that does not declare it."""

LOSS_GRANULARITY: Granularity = "token"
"""The default of a loss: it takes advantages that vary over the tokens of a completion."""


def unwrap(component: object) -> object:
    """Return the function under a partial: declarations are the function's."""
    return unwrap(component.func) if isinstance(component, partial) else component


def declared(component: object, name: str) -> Any:
    """Return what a component declares under ``name``, or the default."""
    return getattr(unwrap(component), name, DEFAULTS[name])


def check_declarations(component: object, key: str) -> None:
    """ValueError for a declaration that is misspelt or has a value it cannot have; ``key`` is the component's config key."""
    import difflib

    target = unwrap(component)
    own = [name for name in dir(target) if not name.startswith("_")]
    for name in own:
        close = difflib.get_close_matches(name, DEFAULTS, n=1, cutoff=0.85)
        if close and name not in DEFAULTS and close[0] not in own:
            raise ValueError(
                f"{key}: {_name(target)} declares {name}; did you mean {close[0]}? Declarations are {', '.join(DEFAULTS)}"
            )
    if not isinstance(getattr(target, "reads", ALL_FIELDS), frozenset | set):
        raise ValueError(
            f"{key}: {_name(target)}.reads must be a frozenset of fields of Rollouts, as frozenset({{'rewards'}})"
        )
    if unknown := sorted(set(declared(component, "reads")) - ALL_FIELDS):
        close = difflib.get_close_matches(unknown[0], ALL_FIELDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{key}: {_name(target)}.reads names {unknown[0]!r}, which is no field of Rollouts{hint} "
            f"They are {', '.join(sorted(ALL_FIELDS))}"
        )
    if declared(component, "granularity") not in ("token", "sequence"):
        raise ValueError(
            f"{key}: {_name(target)}.granularity must be 'token' or 'sequence', got {declared(component, 'granularity')!r}"
        )
    size = declared(component, "min_group_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{key}: {_name(target)}.min_group_size must be a whole number of at least 1, got {size!r}")


def _name(target: object) -> str:
    return getattr(target, "__qualname__", type(target).__qualname__)


@runtime_checkable
class Problems(Protocol):
    def __call__(self) -> list[Problem]:
        """Return the problems of a set, in a fixed order."""
        ...


OnFinished = Callable[[Rollouts, Int[Tensor, " n"]], None]
"""Called once per finished completion, with its index in the final batch."""


@runtime_checkable
class Sampler(Protocol):
    # Properties, so that fields of a frozen dataclass satisfy the Protocol. A policy is Any: a sampler may take its own kind of model.
    @property
    def completions_per_prompt(self) -> int: ...
    @property
    def temperature(self) -> float: ...

    def __call__(self, policy: Any, prompts: Prompts, seed: int) -> Rollouts:
        """Sample ``completions_per_prompt`` completions per prompt; those of prompt i have ``group`` i.

        Fills the six required fields, and ``logprobs``, ``entropy`` and ``sampler_logprobs`` if the engine can hand them over. The same
        seed and weights give the same completions. A sampler that also takes ``on_finished: OnFinished | None`` (``StreamingSampler``)
        reports completions while it samples the others: pointwise rewards are then computed beside sampling.
        """
        ...


@runtime_checkable
class StreamingSampler(Protocol):
    """A sampler that reports finished completions while it goes on with the others."""

    def __call__(self, policy: Any, prompts: Prompts, seed: int, on_finished: OnFinished | None = None) -> Rollouts: ...


@runtime_checkable
class WeightSyncedSampler(Sampler, Protocol):
    """A sampler with an engine of its own, which must be handed the policy's weights."""

    @property
    def max_difference(self) -> float:
        """Nats that its log-probabilities may differ from the policy's, averaged over the tokens of a rollout batch."""
        ...

    def sync(self, policy: Any) -> None:
        """Take the policy's weights. Called on every rank before each rollout batch and each validation, with the full policy."""
        ...

    def sleep(self) -> None:
        """Release what is not needed until the next sync."""
        ...


def sync(sampler: Sampler, policy: nn.Module) -> None:
    if isinstance(sampler, WeightSyncedSampler):
        sampler.sync(policy)


def sleep(sampler: Sampler) -> None:
    if isinstance(sampler, WeightSyncedSampler):
        sampler.sleep()


@runtime_checkable
class Guide(Protocol):
    """An expert policy whose completions are off-policy samples."""

    completions_per_prompt: int
    """Completions that join every prompt's on-policy ones; 0: the guide serves the zero-reward batch alone."""

    def __call__(self, prompts: Prompts, completions_per_prompt: int, seed: int) -> Rollouts:
        """Return ``completions_per_prompt`` completions per prompt; those of prompt i have ``group`` i.

        Fills what a sampler fills, except for ``entropy``, which is pi_old's; ``logprobs`` is the denominator of the ratio.
        """
        ...


@runtime_checkable
class Reward(Protocol):
    """Declares ``counts_for_correctness`` and ``pointwise``."""

    def __call__(self, texts: Texts) -> Sequence[float] | Float[Tensor, " R"] | Mapping[str, Sequence[float] | Tensor]:
        """Return one number per completion, or a mapping of named terms whose sum is the reward."""
        ...


@runtime_checkable
class PointwiseReward(Reward, Protocol):
    """A reward that looks at each completion alone, so that it may run in a thread while others are sampled.

    What it says of one completion must not depend on others, and it must not draw from the process's random generators, from which
    sampling draws.
    """

    pointwise: bool


@runtime_checkable
class Filter(Protocol):
    """Chooses the groups that train. Declares ``max_generation_batches``."""

    def __call__(self, rollouts: Rollouts) -> Bool[Tensor, " groups"]:
        """Return True for each group to train on.

        ``rollouts.group`` counts the groups from 0, without gaps; rewards and outcomes are filled.
        """
        ...


@runtime_checkable
class Reference(Protocol):
    def __call__(self, policy: nn.Module, rollouts: Rollouts, temperature: float) -> Float[Tensor, "R T"]:
        """Return log pi_ref of each completion token, in nats, of softmax(logits / temperature)."""
        ...


@runtime_checkable
class MovingReference(Reference, Protocol):
    """A reference that follows the policy; its weights are in the run's checkpoint."""

    def update(self, policy: nn.Module) -> None:
        """Called after every iteration, on every rank; the weights may be DTensors."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@runtime_checkable
class Shaper(Protocol):
    """Declares ``reads``, ``granularity`` and ``min_group_size``."""

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        """Return the advantage of every token, over complete groups; 0 where ``rollouts.mask`` is False."""
        ...


@runtime_checkable
class Correction(Protocol):
    """Declares ``reads`` and ``granularity``."""

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        """Return the shaped rollouts with other advantages or a smaller mask; advantages stay 0 where the mask is False."""
        ...


@runtime_checkable
class Aggregation(Protocol):
    """Declares ``reads``."""

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        """Return the weight of every token of one optimizer step, over all ranks; 0 where ``rollouts.mask`` is False."""
        ...


Metric = Float[Tensor, "..."] | float
"""A value per token (NaN where a token has none), a 0-d tensor, or a float."""


@runtime_checkable
class Loss(Protocol):
    """Declares ``reads``, ``granularity`` and ``proportional_to_advantage``."""

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Any]]:
        """Return the loss of every token, and metrics by name.

        ``logprobs`` are the policy's, with gradient. The step's loss is ``(per_token * rollouts.weights).sum()``. What is logged of a
        metric is its mean over the counted tokens of the whole step, however the step is split into micro-batches.
        """
        ...


@runtime_checkable
class SupportsPrepare(Protocol):
    """Any component with checks that need the problems, or with weights of its own to load.

    Called once, after the problems are read and before the policy's weights are.
    """

    def prepare(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None: ...


def prepare(components: Iterable[object], problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None:
    for component in components:
        if isinstance(component, SupportsPrepare):
            component.prepare(problems, tokenizer)


Regularizer = Loss
"""Added to the loss per token, under the same weights; its own weight is its own field."""
Optimizer = Callable[..., object]
"""A partial of a torch optimizer: called with the parameters."""
Schedule = Callable[..., object]
"""A partial of a learning-rate schedule: called with the optimizer, and with ``num_training_steps`` if it takes it."""
