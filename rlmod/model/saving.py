"""Saving a policy in Hugging Face format, and reading the shapes of saved weights."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_policy(
    policy: nn.Module, tokenizer: "PreTrainedTokenizerBase", folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Save in Hugging Face format, so that ``AutoModelForCausalLM.from_pretrained(folder)`` loads it; with an adapter, only the adapter.

    ``weights`` are the full weights of a policy that is sharded over ranks.
    """
    cast(Any, policy).save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    tokenizer.save_pretrained(folder)
    _add_rope_keys(folder / "config.json")
    _use_older_tokenizer_keys(folder, getattr(tokenizer, "rlmod_source_class", None))
    for file in folder.glob("*.safetensors"):  # safetensors makes them readable for their owner only
        shutil.copymode(folder / "tokenizer_config.json", file)


def placeholders(policy: nn.Module) -> dict[str, Tensor]:
    """Return a state dict with one number per weight, tied where the weights are tied: enough to try ``save_policy``."""
    numbers: dict[int, Tensor] = {}
    state = policy.state_dict()
    return {name: numbers.setdefault(weight.data_ptr(), torch.zeros(1)) for name, weight in state.items()}


def _add_rope_keys(path: Path) -> None:
    """Add the rotary settings under the names that transformers 4 and older engines read. Without these they assume a base of 10,000."""
    if not path.is_file():
        return  # an adapter has no config of its own
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {name: value for name, value in rope.items() if name != "rope_theta"})
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _use_older_tokenizer_keys(folder: Path, source_class: str | None) -> None:
    """Write the tokenizer's settings under names that transformers 4 reads too, where it cannot load those that transformers 5 writes.

    transformers 5 chooses the class by the name in this file and the model's type. So the name that the source had gives the same class
    again; without a model beside it, only the general one does.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    same_choice = source_class == "PreTrainedTokenizerFast" or (folder / "config.json").is_file()
    if config.get("tokenizer_class") == "TokenizersBackend" and source_class is not None and same_choice:
        config["tokenizer_class"] = source_class
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """Return the shapes of the weights that ``save_policy`` wrote, as meta tensors."""
    from safetensors import safe_open

    weights: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            weights |= {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    return weights


def trained_weights(policy: nn.Module, saved: Collection[str]) -> dict[str, Tensor]:
    """Return the trained weights by the names that ``save_policy`` writes: without the adapter's name, tied weights once per saved name."""
    once = {name for name, _ in policy.named_parameters()}
    written = {
        name.replace(".default.", "."): (weight, name in once)
        for name, weight in policy.named_parameters(remove_duplicate=False)
        if weight.requires_grad
    }
    return {name: weight for name, (weight, needed) in written.items() if needed or name in saved}
