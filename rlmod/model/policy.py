"""The language model that is trained, with its tokenizer: loaded, asked for its logits, and saved."""

import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlmod.model import shared_prompts
from rlmod.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHIPPED = Path(__file__).parent / "policies"
"""The tiny policies that come with rlmod, by name; tools/tiny_policies.py trains them."""


@dataclass(frozen=True, kw_only=True)
class HFPolicy:
    """Any causal language model of transformers: a folder, a name on the hub, or ``tiny`` and ``strong``, which rlmod ships."""

    path: str
    dtype: str = "float32"
    """Dtype of the trained weights; mixed precision is trainer.precision."""
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile of each layer, for training and scoring: a start that is slower by a minute, and then faster steps."""
    adapter: Callable[..., Any] | None = None
    """The adapter that is trained instead of the weights; null: the weights."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"policy.dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise ValueError("policy.compile=true: torch.compile needs a C++ compiler, and there is no g++ or clang++")
        # What can only be a folder is looked for at once: transformers takes seconds to be imported.
        here = self.path.startswith(("/", ".", "~")) or self.path.count("/") > 1  # a name on the hub has one
        if here and not Path(self.location).is_dir():
            raise ValueError(self._cannot("policy", "there is no such folder"))
        if saved := sorted(Path(self.location).glob("checkpoints/step-*/policy")):
            raise ValueError(f"policy.path={self.path} is a run's folder; its newest policy is policy.path={saved[-1]}")
        if self.adapter is not None and self.is_adapter:
            raise ValueError(
                f"policy.path={self.path} is an adapter already, which goes on being trained: leave adapter=none"
            )

    @property
    def location(self) -> str:
        shipped = SHIPPED / self.path
        is_shipped = self.path in {folder.name for folder in SHIPPED.iterdir()} and not Path(self.path).exists()
        return str(shipped) if is_shipped else str(Path(self.path).expanduser()) if self.path[:1] == "~" else self.path

    @property
    def is_adapter(self) -> bool:
        """True if the folder holds an adapter, as a run with adapter=lora saves it, rather than a full model."""
        return (Path(self.location) / "adapter_config.json").is_file()

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Padding on the left; without a pad token, the EOS token pads (masks are explicit, so nothing confuses the two)."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.location)
        except (OSError, ValueError) as error:
            raise ValueError(self._cannot("tokenizer", error)) from error
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"policy.path={self.path}: the tokenizer has no EOS token, so no completion could ever end; "
                "set eos_token in its tokenizer_config.json"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        return tokenizer

    def model(self, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
        from transformers import AutoModelForCausalLM

        settings = {"dtype": getattr(torch, self.dtype), "attn_implementation": self.attention}
        try:
            if self.is_adapter:
                from peft import AutoPeftModelForCausalLM

                model = AutoPeftModelForCausalLM.from_pretrained(self.location, is_trainable=True, **settings)
            else:
                model = AutoModelForCausalLM.from_pretrained(self.location, **settings)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(self._cannot("model", error)) from error
        rows = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportIndexIssue]
        if len(tokenizer) > rows:
            raise ValueError(
                f"policy.path={self.path}: the tokenizer has {len(tokenizer)} tokens, the model only {rows} embeddings: "
                "they do not belong together"
            )
        ends = model.generation_config
        known = ends.eos_token_id if isinstance(ends.eos_token_id, list) else [ends.eos_token_id]
        ends.eos_token_id = sorted({cast(int, tokenizer.eos_token_id), *(i for i in known if i is not None)})
        ends.pad_token_id = tokenizer.pad_token_id
        model.train()  # from_pretrained hands it over in evaluation mode
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.compile:
            shared_prompts.compile_layers(model)
        return model if self.adapter is None else self.adapter(model)

    def shape(self) -> "PreTrainedConfig":
        """The config of the model, or of the one under the adapter; no weights are loaded."""
        from transformers import AutoConfig

        location = self.location
        try:
            if self.is_adapter:
                from peft import PeftConfig

                location = str(PeftConfig.from_pretrained(location).base_model_name_or_path)
            return AutoConfig.from_pretrained(location)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(self._cannot("config", error)) from error

    def frozen(self) -> "PreTrainedModel":
        """This model as a guide or a reference: without gradients, in evaluation mode.

        Kept outside of the LightningModule's tree, so that no optimizer and no checkpoint ever sees it.
        """
        return replace(self, adapter=None, compile=False).model(self.tokenizer()).eval().requires_grad_(False)

    def _cannot(self, what: str, error: Exception | str) -> str:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shipped = ", ".join(sorted(folder.name for folder in SHIPPED.iterdir()))
        return (
            f"policy.path={self.path}: no {what} could be loaded ({reason}). "
            f"Give a folder in Hugging Face format, a name on the hub, or one of the shipped: {shipped}"
        )


def completion_texts(tokenizer: "PreTrainedTokenizerBase", rollouts: Rollouts) -> list[str]:
    """The text of each completion: the counted tokens, without special ones."""
    counted = rollouts.completion_ids[rollouts.mask].split(rollouts.mask.sum(1).tolist())
    ids = [row.tolist() for row in counted]
    return cast(list[str], tokenizer.batch_decode(ids, skip_special_tokens=True))


def save_policy(
    policy: nn.Module, tokenizer: "PreTrainedTokenizerBase", folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """In Hugging Face format: ``AutoModelForCausalLM.from_pretrained(folder)`` loads it; of a policy with an adapter, the adapter.

    ``weights`` are the whole ones of a policy that holds only its share.
    """
    cast(Any, policy).save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # which are written for their owner alone, unlike all else
        shutil.copymode(folder / "tokenizer_config.json", file)


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights that ``save_policy`` wrote as meta tensors: shapes alone."""
    from safetensors import safe_open

    weights: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            weights |= {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    return weights


def trained_weights(policy: nn.Module, saved: Collection[str]) -> dict[str, Tensor]:
    """Return the trained weights under the names that ``save_policy`` writes: no adapter's own name, tied ones as often as saved."""
    once = {name for name, _ in policy.named_parameters()}
    written = {
        name.replace(".default.", "."): (weight, name in once)
        for name, weight in policy.named_parameters(remove_duplicate=False)
        if weight.requires_grad
    }
    return {name: weight for name, (weight, needed) in written.items() if needed or name in saved}
