"""The sizes of a run: all numbers that its plan depends on."""

import math
from dataclasses import dataclass

from rlmod.commands.plan.hardware import Hardware
from rlmod.commands.plan.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of which every rank holds all weights: a guide or a reference."""

    shape: Shape
    width: int
    """Bytes per weight."""
    rows: int = 0
    """Rows sampled at once on one rank."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter. Its weights are in float32, as peft creates them."""

    rank: int
    targets: tuple[str, ...]
    """Names of the adapted linear layers."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How on-policy completions are sampled."""

    engine: bool = False
    """True if a separate engine (vLLM) samples, not the policy itself."""
    rows_per_batch: int | None = None
    """Rows sampled at once; None: all."""
    share: float = 0.0
    """Share of the accelerator's memory that the engine takes; 0 if it runs elsewhere."""
    sleeps: bool = False
    """True if the engine frees its memory while the policy trains."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Sizes of a run. Rows count those of one rank. Widths are bytes per number. Prompt and completion are the longest, in tokens."""

    shape: Shape
    weight_width: int
    """Width of the weights that are stored and trained."""
    autocast: bool
    """True if trainer.precision is mixed: matrix products are in 16 bits, whatever the weights are."""
    attention: str
    checkpointing: bool
    adapter: Adapter | None
    strategy: str
    """single, ddp, fsdp or fsdp2."""
    ranks: int
    reduced: bool
    """True if trainer.strategy.reduced_precision is set: sharded weights are gathered in 16 bits."""
    offload: bool
    sharded_checkpoints: bool
    optimizer_states: int
    """Numbers that the optimizer stores per trained parameter."""
    prompt: int
    completion: int
    mean_prompt: float
    mean_completion: float
    draws: float
    """Prompts sampled per prompt that trains; above 1 with dynamic sampling."""
    prompts: int
    """Prompts per rollout batch."""
    on_policy_rows: int
    """Rows that the policy samples per rollout batch, without refills."""
    guide_rows: int
    """Rows from the guide, including those of the zero-reward batch."""
    rollout_rows: int
    """Most rows that train on one rollout batch: on-policy rows, the guide's, and the zero-reward batch."""
    validation_rows: int
    """Rows that a validation samples at once; 0 without validation."""
    minibatches: int
    epochs: int
    micro_batch: int
    micro_batch_tokens: int | None
    entropy: bool
    """True if a regularizer needs the entropy with its gradient."""
    sampling: Sampling
    guide: Model | None
    reference: Model | None
    hardware: Hardware

    @property
    def sharded(self) -> bool:
        """True if parameters are sharded over the ranks."""
        return self.strategy in ("fsdp", "fsdp2")

    @property
    def shards(self) -> int:
        """Number of ranks that share one copy of the parameters."""
        return self.ranks if self.sharded else 1

    @property
    def gathered_width(self) -> int:
        """Width of a weight in a gathered layer."""
        return 2 if self.reduced else self.weight_width

    @property
    def casts_weights(self) -> bool:
        """True if autocast makes 16-bit copies of the weights and inputs of linear layers."""
        return self.autocast and self.gathered_width > 2

    @property
    def compute_width(self) -> int:
        """Width of the operands and outputs of matrix products."""
        return 2 if self.autocast else self.gathered_width

    @property
    def residual_width(self) -> int:
        """Width of the residual stream, which has the precision of the weights."""
        return self.gathered_width

    @property
    def trained_parameters(self) -> int:
        """Number of parameters with a gradient."""
        if self.adapter is None:
            return self.shape.parameters
        return self.shape.lora(self.adapter.rank, list(self.adapter.targets))

    @property
    def trained_width(self) -> int:
        """Width of a trained parameter."""
        return self.weight_width if self.adapter is None else 4

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.prompt + self.completion

    @property
    def step_rows(self) -> int:
        """Most rows of an optimizer step."""
        return math.ceil(self.rollout_rows / self.minibatches)

    @property
    def rows(self) -> int:
        """Most rows of a micro-batch, all at full length."""
        by_tokens = self.step_rows if self.micro_batch_tokens is None else self.micro_batch_tokens // self.length
        return max(min(self.micro_batch, self.step_rows, by_tokens), 1)

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of an optimizer step with all rows at full length."""
        return math.ceil(self.step_rows / self.rows)
