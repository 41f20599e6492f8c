"""The sizes of a run: all that its plan depends on, in numbers."""

import math
from dataclasses import dataclass

from rlmod.commands.plan.hardware import Hardware
from rlmod.commands.plan.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is held whole on every rank: a guide, a reference."""

    shape: Shape
    width: int
    """Bytes of a weight."""
    rows: int = 0
    """Rows sampled together on one rank."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    rank: int
    targets: tuple[str, ...]
    """The linear layers that it changes; its weights are in float32, as peft makes them."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the policy's on-policy completions are drawn."""

    engine: bool = False
    """An engine of its own beside the policy (vLLM), not the policy itself."""
    rows_at_once: int | None = None
    share: float = 0.0
    """Share of the accelerator's memory that the engine takes; 0 if it runs elsewhere."""
    sleeps: bool = False
    """It hands its memory back while the policy trains."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Rows are those of one rank. Widths are bytes of a number. Prompt and completion are the longest, in tokens."""

    shape: Shape
    weight: int
    """Width of a weight as it is kept and trained."""
    autocast: bool
    """trainer.precision is mixed: products are taken in 16 bits, whatever the weights are."""
    attention: str
    checkpointing: bool
    adapter: Adapter | None
    strategy: str
    """single, ddp, fsdp or fsdp2."""
    ranks: int
    reduced: bool
    """trainer.strategy.reduced_precision: sharded weights are gathered in 16 bits."""
    offload: bool
    sharded_checkpoints: bool
    optimizer_states: int
    """Numbers that the optimizer keeps for each that is trained."""
    prompt: int
    completion: int
    mean_prompt: float
    mean_completion: float
    draws: float
    """Prompts sampled for each that trains; above 1 with dynamic sampling."""
    prompts: int
    """Prompts per rollout batch."""
    own_rows: int
    """Rows that the policy samples per rollout batch, without refills."""
    guide_rows: int
    """Rows that the guide supplies, those of the zero-reward batch included."""
    collected_rows: int
    """Rows that train, at most: on-policy ones, the guide's, and the zero-reward batch."""
    validation_rows: int
    """Rows that a validation samples together; 0 without validation."""
    minibatches: int
    epochs: int
    micro_batch: int
    micro_batch_tokens: int | None
    entropy: bool
    """A penalty wants the entropy with its gradient."""
    sampling: Sampling
    guide: Model | None
    reference: Model | None
    hardware: Hardware

    @property
    def sharded(self) -> bool:
        return self.strategy in ("fsdp", "fsdp2")

    @property
    def shards(self) -> int:
        return self.ranks if self.sharded else 1

    @property
    def gathered(self) -> int:
        """Width of a weight while a sharded layer is whole."""
        return 2 if self.reduced else self.weight

    @property
    def casts(self) -> bool:
        """Autocast makes 16-bit copies of weights and of what comes into a linear layer."""
        return self.autocast and self.gathered > 2

    @property
    def compute(self) -> int:
        """Width of what products are taken in, and of what they give."""
        return 2 if self.autocast else self.gathered

    @property
    def residual(self) -> int:
        """Width of the stream between the layers, which is that of the weights."""
        return self.gathered

    @property
    def trained(self) -> int:
        """Numbers that have a gradient."""
        if self.adapter is None:
            return self.shape.parameters
        return self.shape.lora(self.adapter.rank, list(self.adapter.targets))

    @property
    def trained_width(self) -> int:
        return self.weight if self.adapter is None else 4

    @property
    def length(self) -> int:
        return self.prompt + self.completion

    @property
    def step_rows(self) -> int:
        """Return the most rows of an optimizer step."""
        return math.ceil(self.collected_rows / self.minibatches)

    @property
    def rows(self) -> int:
        """Return the most rows that go through the policy together in training, all at full length."""
        by_tokens = self.step_rows if self.micro_batch_tokens is None else self.micro_batch_tokens // self.length
        return max(min(self.micro_batch, self.step_rows, by_tokens), 1)

    @property
    def micro_batches(self) -> int:
        """Return the micro-batches of an optimizer step in which every row trains at full length."""
        return math.ceil(self.step_rows / self.rows)
