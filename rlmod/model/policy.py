"""The policy and its tokenizer: loading, checks, and decoding of completions."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from rlmod.model import gguf, noise, shared_prompts
from rlmod.types import Rollouts

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHIPPED = Path(__file__).parent / "policies"
"""The tiny policies that come with rlmod, by name; tools/tiny_policies.py trains them."""


@dataclass(frozen=True, kw_only=True)
class HFPolicy:
    """A causal language model: a folder, a name on the hub, a GGUF file, or one of the names ``tiny``, ``strong`` and ``smollm2``.

    rlmod ships ``tiny`` and ``strong``; ``rlmod-fetch smollm2`` installs the third. A GGUF file is converted once to a Hugging Face folder
    in the cache. Code that comes with a model is never executed, so a model that needs it is refused.
    """

    path: str
    gguf_file: str | None = None
    """Name of the GGUF file in the folder or hub repository ``path``; null: the path itself says what it is."""
    dtype: str = "float32"
    """Dtype of the trained weights; mixed precision is trainer.precision."""
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    dropout: bool = False
    """Train with the model's own dropout and router noise, if it has any. false: they are 0, so that the ratios begin at 1."""
    compile: bool = False
    """Compile each layer with torch.compile, for training and the log-prob pass. The start takes a minute longer; steps are faster."""
    adapter: Callable[..., Any] | None = None
    """Adds an adapter that is trained instead of the weights; null: the weights are trained."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"policy.dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise ValueError(
                "policy.compile=true: torch.compile needs a C++ compiler; install g++ or clang++, or set policy.compile=false"
            )
        # A path that can only be a folder or a file is checked now, because importing transformers takes seconds.
        is_place = self.path.startswith(("/", ".", "~")) or self.path.count("/") > 1  # a name on the hub has one
        if self.gguf_file is not None and self._has_name:
            raise ValueError(
                f"policy.gguf_file={self.gguf_file}: policy.path={self.path} is a policy without such files"
            )
        if self.is_gguf:
            if self.gguf_file is None or is_place or Path(self.path).exists():
                gguf.find_file(self.path, self.gguf_file)
            return
        if is_place and not Path(self.location).is_dir():
            raise ValueError(self._load_error("policy", "there is no such folder"))
        if saved := sorted(Path(self.location).glob("checkpoints/step-*/policy")):
            raise ValueError(
                f"policy.path={self.path} is the folder of a run; its newest policy is policy.path={saved[-1]}"
            )
        if self.adapter is not None and self.is_adapter:
            raise ValueError(
                f"policy.path={self.path} is an adapter already, and its training continues; set adapter=none"
            )

    @property
    def is_shipped(self) -> bool:
        """True if the path names a policy that rlmod ships, which only knows the embedded arithmetic."""
        return self.path in {folder.name for folder in SHIPPED.iterdir()} and not Path(self.path).exists()

    @property
    def _has_name(self) -> bool:
        """True if the path is one of the names that stand for a policy here, and not a folder."""
        return self.is_shipped or (self.path in gguf.PACKAGES and not Path(self.path).exists())

    @property
    def is_gguf(self) -> bool:
        """True if the policy is a GGUF file."""
        return not self.is_shipped and gguf.is_gguf(self.path, self.gguf_file)

    @property
    def location(self) -> str:
        """The path to load from: the path as given, or the folder that its name stands for. A GGUF file is converted first."""
        if self.is_shipped:
            return str(SHIPPED / self.path)
        if self.is_gguf:
            return str(gguf.convert(gguf.find_file(self.path, self.gguf_file)))
        if self._has_name:
            return str(gguf.packaged_folder(self.path))
        return str(gguf.expand(self.path, "policy.path")) if self.path[:1] == "~" else self.path

    @property
    def is_adapter(self) -> bool:
        """True if the folder holds an adapter that a run with adapter=lora saved, not a full model."""
        return not self.is_gguf and (Path(self.location) / "adapter_config.json").is_file()

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer, with padding on the left. ValueError if it cannot be loaded or has no EOS token.

        Without a pad token the EOS token is used for padding; masks are explicit, so the two are not confused.
        """
        from transformers import AutoTokenizer
        from transformers.models.auto.tokenization_auto import get_tokenizer_config

        location = self.location
        try:
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
            tokenizer.rlmod_source_class = get_tokenizer_config(location).get("tokenizer_class")
        except (OSError, ValueError) as error:
            raise ValueError(self._load_error("tokenizer", error)) from error
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
        """Load the model in training mode, with its adapter if there is one. ValueError if it cannot be loaded or saved again."""
        from transformers import AutoModelForCausalLM

        settings = {
            "dtype": getattr(torch, self.dtype),
            "attn_implementation": self.attention,
            "trust_remote_code": False,
        }
        location = self.location
        try:
            if self.is_adapter:
                from peft import AutoPeftModelForCausalLM

                self.base_location()
                model = AutoPeftModelForCausalLM.from_pretrained(location, is_trainable=True, **settings)
            else:
                model = AutoModelForCausalLM.from_pretrained(location, **settings)
        except UnpicklingError as error:
            reason = "its .bin file holds more than weights, which could execute code; save it as safetensors"
            raise ValueError(self._load_error("model", reason)) from error
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(self._load_error("model", error)) from error
        rows = embedding_rows(model)
        self._check_vocabulary(tokenizer, rows)
        ends = model.generation_config
        known = ends.eos_token_id if isinstance(ends.eos_token_id, list) else [ends.eos_token_id]
        ends.eos_token_id = sorted({cast(int, tokenizer.eos_token_id), *(i for i in known if i is not None)})
        ends.pad_token_id = tokenizer.pad_token_id
        self._make_savable(ends)
        if not self.dropout:
            noise.switch_off(model)
        attach_tokenizer(model, tokenizer)
        model.train()  # from_pretrained returns it in evaluation mode
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.compile:
            shared_prompts.compile_layers(model)
        if self.adapter is not None:
            model = self.adapter(model)
        self._check_adapted_layers(model)
        return model

    def _check_adapted_layers(self, model: nn.Module) -> None:
        """Raise ValueError if an adapter changes one of two layers that share their weight: no merged weight could serve both."""
        uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
        for name, layer in model.named_modules():
            adapted = getattr(layer, "base_layer", getattr(layer, "original_module", None))
            if uses[id(getattr(adapted, "weight", None))] > 1:
                raise ValueError(
                    f"policy.adapter.targets (target_modules of a saved adapter) includes {name.rpartition('.')[2]}, but in "
                    f"{self.path} the head and the embedding are one weight: the merged policy could not compute what was trained; "
                    "leave out lm_head and embed_tokens, as all-linear does"
                )

    def _check_vocabulary(self, tokenizer: "PreTrainedTokenizerBase", rows: int) -> None:
        """Raise ValueError if the tokenizer belongs to another model.

        It may list special tokens without an embedding that this model never produces, such as the image placeholder of a multimodal
        family. A prompt that contains one is refused once the prompts are read.
        """
        special = _special_tokens(tokenizer)
        needed = [tokenizer.eos_token, tokenizer.pad_token]
        vocabulary = tokenizer.get_vocab() if len(tokenizer) > rows else special
        missing = [token for token, i in vocabulary.items() if i >= rows and (token in needed or token not in special)]
        if missing:
            raise ValueError(
                f"policy.path={self.path}: the tokenizer has {len(tokenizer)} tokens, the model only {rows} embeddings, and none for "
                f"{missing[0]!r}: they do not belong together; give a folder that has the model's own tokenizer"
            )

    def _make_savable(self, config: "GenerationConfig") -> None:
        """Set do_sample if transformers would otherwise refuse to save the config. ValueError, before training, if it still refuses."""
        try:
            config.validate(strict=True)
        except ValueError:
            # Older models' files have sampling settings without do_sample. rlmod's samplers set their own.
            config.do_sample = True
            try:
                config.validate(strict=True)
            except ValueError as error:
                raise ValueError(
                    f"policy.path={self.path}: its generation_config.json cannot be saved with the trained policy; correct or remove it: "
                    f"{' '.join(str(error).split())}"
                ) from error

    def shape(self) -> "PreTrainedConfig":
        """Load the config of the model, or of the base model under an adapter, without weights."""
        from transformers import AutoConfig

        location = self.base_location() if self.is_adapter else self.location
        try:
            return AutoConfig.from_pretrained(location, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(self._load_error("config", error)) from error

    def base_location(self) -> str:
        """Return where the model under a saved adapter is. ValueError if it was a folder that is gone."""
        base = str(
            json.loads((Path(self.location) / "adapter_config.json").read_text(encoding="utf-8"))[
                "base_model_name_or_path"
            ]
        )
        if base.startswith("/") and not Path(base).is_dir():
            converted = Path(base).parent.name == "gguf"
            remedy = "convert its GGUF file again, or run rlmod-fetch" if converted else "put it back"
            raise ValueError(
                f"policy.path={self.path} is an adapter, and the model under it is gone: there is no folder {base}; {remedy}, or write its "
                "path in adapter_config.json"
            )
        return base

    def skeleton(self) -> "PreTrainedModel":
        """Build the model, or the base model under an adapter, without weights: on the meta device."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.shape())

    def frozen(self) -> "PreTrainedModel":
        """Load this model as a guide or a reference: without gradients, in evaluation mode.

        It stays outside the LightningModule's tree, so that no optimizer or checkpoint includes it.
        """
        return replace(self, adapter=None, compile=False).model(self.tokenizer()).eval().requires_grad_(False)

    def _load_error(self, what: str, error: Exception | str) -> str:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shipped = sorted(folder.name for folder in SHIPPED.iterdir())
        return (
            f"policy.path={self.path}: the {what} cannot be loaded ({reason}). "
            "Give a folder in Hugging Face format, a name on the hub, a GGUF file, or one of the policies that have a name here: "
            f"{', '.join([*shipped, *gguf.PACKAGES])}"
        )


def attach_tokenizer(policy: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Keep the tokenizer with the policy, for a sampler that looks for stop strings. It is no part of the policy's state."""
    cast(Any, policy).rlmod_tokenizer = tokenizer


def tokenizer_of(policy: nn.Module) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that ``attach_tokenizer`` kept with the policy."""
    if (tokenizer := getattr(policy, "rlmod_tokenizer", None)) is None:
        raise ValueError(
            "sampler.stop needs the tokenizer of the policy: load the policy with rlmod.HFPolicy, or call "
            "rlmod.model.policy.attach_tokenizer(policy, tokenizer)"
        )
    return tokenizer


def completion_texts(
    tokenizer: "PreTrainedTokenizerBase",
    rollouts: Rollouts,
    *,
    skip_special_tokens: bool = False,
    stop: Sequence[str] = (),
) -> list[str]:
    """Return the text of each completion: the tokens under the mask, without BOS, EOS, padding and unknown tokens.

    Other special tokens stay, because a reward may look for them: a tokenizer may list ``<think>`` among its special tokens. A special
    token at the end of a completion that is not truncated counts as its EOS, because a model may have several EOS tokens, unless it
    completes one of the ``stop`` strings. ``skip_special_tokens`` removes all of them.
    """
    counted = rollouts.completion_ids[rollouts.mask].split(rollouts.mask.sum(1).tolist())
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    removed = {getattr(tokenizer, name) for name in names}
    special = _special_tokens(tokenizer).values()
    ids = []
    for row, truncated in zip([row.tolist() for row in counted], rollouts.truncated.tolist(), strict=True):
        ended = bool(row) and not truncated and row[-1] in special
        if ended and stop:
            text = cast(str, tokenizer.decode(row, skip_special_tokens=False))
            ended = not any(each in text for each in stop)
        ids.append([token for token in (row[:-1] if ended else row) if token not in removed])
    return cast(list[str], tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens))


def embedding_rows(model: nn.Module) -> int:
    """Return the number of token ids that the model has embeddings for."""
    return cast(Any, model).get_input_embeddings().weight.shape[0]


def positions(config: "PreTrainedConfig | None") -> int | None:
    """Return the longest sequence that a model was made for, in tokens; None if its config does not say."""
    text = None if config is None else config.get_text_config()
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return the ids of all special tokens by their text, including those without a role such as EOS."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, cast(list[int], tokenizer.all_special_ids), strict=True))


def turn_end_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids that end a completion: the EOS, and the special token that the chat template writes after an assistant's turn."""
    ends = {cast(int, tokenizer.eos_token_id)}
    if tokenizer.chat_template:
        from jinja2 import TemplateError

        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "rlmod"}]
        try:
            text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
        except (TemplateError, ValueError, TypeError):
            return ends
        suffix = text.rpartition("rlmod")[2].lstrip()
        ends |= {number for token, number in _special_tokens(tokenizer).items() if suffix.startswith(token)}
    return ends
