"""The contents of a GGUF file, read with transformers and checked: a file of which it would lose a part is refused."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [LLAMA3.replace("{1,3}", "")],
}
"""Splits of text before byte-level merges, by the name in ``tokenizer.ggml.pre``. transformers knows one for each architecture."""
QUANTIZED_AS = torch.bfloat16
"""Dtype to which dequantized weights are rounded."""


def read(file: Path) -> tuple["PreTrainedTokenizerBase", nn.Module, dict[str, Tensor]]:
    """Return the tokenizer, the model without weights, and the weights. ValueError, without the file's name, if a part would be lost."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _foreign(), _quiet_unless_terminal():
        reader = GGUFReader(str(file))
        tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"it lacks {len(missing)} of the weights of {type(model).__name__}, the first one is {missing[0]}"
        )
    _check_that_all_is_read(reader, model)
    fields = {name: _value(reader, name) for name in ("add_bos_token", "pre", "model")}
    _set_splits(tokenizer, fields)
    _set_bos(tokenizer, fields["add_bos_token"])
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the folder holds plain weights
    weights = _weights(model, reader)
    with torch.device("meta"):
        shell = type(model)(model.config).to(next(iter(weights.values())).dtype)
    for name, expected in shell.state_dict().items():  # transformers does not compare them
        if weights[name].shape != expected.shape:
            found = list(weights[name].shape)
            raise ValueError(
                f"its weight {name} has the shape {found}, but its other numbers say {list(expected.shape)}"
            )
    shell.generation_config = model.generation_config
    return tokenizer, shell, weights


@contextlib.contextmanager
def _foreign() -> Iterator[None]:
    """Raise ValueError for any error of the parsers: on a damaged file they fail in many ways."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{reason} (the file is damaged, or transformers cannot read its architecture from GGUF)"
        ) from error


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Switch transformers' progress bars off where they would fill a log file."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _value(reader: Any, name: str) -> Any:
    """Return a value of the tokenizer; None if the file does not say."""
    field = reader.fields.get(f"tokenizer.ggml.{name}")
    return None if field is None else field.contents()


def _check_that_all_is_read(reader: Any, model: Any) -> None:
    """Raise ValueError if the file holds tensors or rotary settings that the model does not have."""
    names = [tensor.name for tensor in reader.tensors]
    held = sum(int(tensor.n_elements) for tensor in reader.tensors)
    weights = sum(weight.numel() for weight in model.parameters())
    if held != weights:
        rotary = [name for name in names if name.startswith("rope_")]
        hint = f", as {rotary[0]}, the scaling of its rotary embedding" if rotary else ""
        raise ValueError(
            f"its tensors hold {held:,} numbers, but the model that transformers builds of it {weights:,}: a part would be lost{hint}"
        )
    scaling = [name for name in reader.fields if name.endswith(".rope.scaling.type")]
    said = reader.fields[scaling[0]].contents() if scaling else "none"
    built = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if said != "none" and built == "default":
        raise ValueError(
            f"{scaling[0]} is {said}, which transformers does not read: the rotary embedding would be another one"
        )


def _set_splits(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Set the splits that the file names, for byte-level tokenizers. ValueError for a name that is not known here."""
    from tokenizers import Regex, pre_tokenizers

    if fields["model"] != "gpt2":
        return
    name = fields["pre"] or "gpt-2"
    if name not in SPLITS:
        raise ValueError(
            f"its tokenizer splits text as {name!r}, and only {', '.join(SPLITS)} are known here: prompts would have other tokens than the "
            "model learned"
        )
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[name]]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])


def _set_bos(tokenizer: Any, wanted: bool | None) -> None:
    """Let the tokenizer put its BOS before a text if the file says so, and not if it says no."""
    from tokenizers.processors import TemplateProcessing

    bos, number = tokenizer.bos_token, tokenizer.bos_token_id
    if wanted is None or bos is None or (tokenizer("a")["input_ids"][:1] == [number]) == wanted:
        return
    before = f"{bos} " if wanted else ""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before}$A", pair=f"{before}$A {before}$B", special_tokens=[(bos, number)] if wanted else []
    )


def _weights(model: Any, reader: Any) -> dict[str, Tensor]:
    """Return the weights in the dtype that they are kept in. Tied ones stay one tensor, and are saved once."""
    state = cast(dict[str, Tensor], model.state_dict())
    if broken := [name for name, weight in state.items() if not weight.isfinite().all()]:
        raise ValueError(f"its weight {broken[0]} is not finite")
    dtype = _kept_dtype({tensor.tensor_type.name for tensor in reader.tensors}, list(state.values()))
    kept: dict[int, Tensor] = {}
    return {name: kept.setdefault(weight.data_ptr(), weight.to(dtype)) for name, weight in state.items()}


def _kept_dtype(types: set[str], weights: list[Tensor]) -> torch.dtype:
    """Return the smallest dtype that holds all weights exactly; bfloat16 for a quantized file."""
    if types - {"F32", "F16", "BF16"}:
        return QUANTIZED_AS
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in weights):
            return dtype
    return torch.float32
