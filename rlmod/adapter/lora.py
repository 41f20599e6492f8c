"""LoRA: trains a low-rank update, while the base weights stay frozen."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """W x becomes W x + (alpha / rank) B A x, with A [rank, in] random and B [out, rank] zero at first

    Source: LoRA, arXiv:2106.09685, sec. 4.1; implemented by the library peft.
    Degenerate: before the first update the policy equals its base model, which remains available as reference=base.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    """Names of modules, as in [q_proj, v_proj]; all-linear: every linear layer except the head.
    A head and an embedding that share their weight cannot be named."""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise ValueError("adapter=lora needs the package peft: pip install 'rlmod[lora]'")
        if self.rank < 1:
            raise ValueError(f"policy.adapter.rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"policy.adapter.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"policy.adapter.dropout must be at least 0 and below 1, got {self.dropout}")

    def __call__(self, model: "PreTrainedModel") -> "PreTrainedModel":
        from peft import LoraConfig, get_peft_model

        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha),
            lora_dropout=self.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(f"policy.adapter.targets={self.targets}: {error}") from error
        if model.is_gradient_checkpointing:
            model.enable_input_require_grads()  # otherwise no gradient would reach the checkpointed layers
        return cast("PreTrainedModel", adapted)
