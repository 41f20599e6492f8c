"""The language model that is trained, with its tokenizer: loaded, asked for its logits, and saved."""

import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlmod.model import noise, shared_prompts
from rlmod.types import Rollouts

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
    dropout: bool = False
    """Train with the model's own dropout and router noise, if it has any. false: they are 0, so that the ratios begin at 1."""
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
        rows = embedding_rows(model)
        self._check_vocabulary(tokenizer, rows)
        ends = model.generation_config
        known = ends.eos_token_id if isinstance(ends.eos_token_id, list) else [ends.eos_token_id]
        ends.eos_token_id = sorted({cast(int, tokenizer.eos_token_id), *(i for i in known if i is not None)})
        ends.pad_token_id = tokenizer.pad_token_id
        self._make_savable(ends)
        if not self.dropout:
            noise.switch_off(model)
        model.train()  # from_pretrained hands it over in evaluation mode
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.compile:
            shared_prompts.compile_layers(model)
        return model if self.adapter is None else self.adapter(model)

    def _check_vocabulary(self, tokenizer: "PreTrainedTokenizerBase", rows: int) -> None:
        """Raise ValueError if the tokenizer is another model's.

        It may list special tokens that no text of this model produces, such as the image placeholder of a multimodal family. A prompt
        that names one is refused when the prompts are known.
        """
        special = _special_tokens(tokenizer)
        needed = [tokenizer.eos_token, tokenizer.pad_token]
        vocabulary = tokenizer.get_vocab() if len(tokenizer) > rows else special
        beyond = [token for token, i in vocabulary.items() if i >= rows and (token in needed or token not in special)]
        if beyond:
            raise ValueError(
                f"policy.path={self.path}: the tokenizer has {len(tokenizer)} tokens, the model only {rows} embeddings, and none for "
                f"{beyond[0]!r}: they do not belong together"
            )

    def _make_savable(self, config: "GenerationConfig") -> None:
        """Complete a generation config that transformers reads but refuses to write, or raise ValueError before anything is trained."""
        try:
            config.validate(strict=True)
        except ValueError:
            config.do_sample = (
                True  # sampling settings without it, as in older models' files; rlmod's samplers set their own
            )
            try:
                config.validate(strict=True)
            except ValueError as error:
                raise ValueError(
                    f"policy.path={self.path}: its generation_config.json could not be saved with the trained policy; mend or remove it: "
                    f"{' '.join(str(error).split())}"
                ) from error

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
    """Return the text of each completion: the counted tokens without BOS, EOS, padding and unknown tokens.

    Other special tokens stay, because a reward may look for them: a tokenizer may list ``<think>`` among its special tokens. A special
    token that ends a completion before the token limit is its EOS, whichever of a model's several EOS tokens it is.
    """
    counted = rollouts.completion_ids[rollouts.mask].split(rollouts.mask.sum(1).tolist())
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    invisible = {getattr(tokenizer, name) for name in names}
    special = _special_tokens(tokenizer).values()
    ids = []
    for row, truncated in zip([row.tolist() for row in counted], rollouts.truncated.tolist(), strict=True):
        ended = bool(row) and not truncated and row[-1] in special
        ids.append([token for token in (row[:-1] if ended else row) if token not in invisible])
    return cast(list[str], tokenizer.batch_decode(ids, skip_special_tokens=False))


def embedding_rows(model: nn.Module) -> int:
    """Return the number of token ids that the model has embeddings for."""
    return cast(Any, model).get_input_embeddings().weight.shape[0]


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return the ids of all special tokens, also of those that have no role such as EOS."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, cast(list[int], tokenizer.all_special_ids), strict=True))


def turn_end_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids that end a completion: the EOS, and the special token that the chat template puts behind an assistant's turn."""
    ends = {cast(int, tokenizer.eos_token_id)}
    if tokenizer.chat_template:
        from jinja2 import TemplateError

        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "rlmod"}]
        try:
            text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
        except (TemplateError, ValueError, TypeError):
            return ends
        behind = text.rpartition("rlmod")[2].lstrip()
        ends |= {number for token, number in _special_tokens(tokenizer).items() if behind.startswith(token)}
    return ends


def save_policy(
    policy: nn.Module, tokenizer: "PreTrainedTokenizerBase", folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """In Hugging Face format: ``AutoModelForCausalLM.from_pretrained(folder)`` loads it; of a policy with an adapter, the adapter.

    ``weights`` are the whole ones of a policy that holds only its share.
    """
    cast(Any, policy).save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    tokenizer.save_pretrained(folder)
    _add_rope_keys(folder / "config.json")
    for file in folder.glob("*.safetensors"):  # which are written for their owner alone, unlike all else
        shutil.copymode(folder / "tokenizer_config.json", file)


def _add_rope_keys(path: Path) -> None:
    """Repeat the rotary settings under the names that transformers 4 and older engines read; without them they assume a base of 10,000."""
    if not path.is_file():
        return  # an adapter has no config of its own
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {name: value for name, value in rope.items() if name != "rope_theta"})
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


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
