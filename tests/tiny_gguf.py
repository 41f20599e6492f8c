"""A GGUF file of a random model of a few thousand weights, with a tokenizer of single characters."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HIDDEN, LAYERS, HEADS = 32, 64, 2, 4
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    template: str | None = None,
    without: str = "",
    bad: str = "",
    more: dict[str, tuple[int, ...]] | None = None,
    keys: dict[str, Any] | None = None,
    key_heads: int = HEADS // 2,
    splits: str = "smollm",
    types: Sequence[str] = ("F32",),
) -> Path:
    """Write the file. ``without`` names a tensor that it lacks, ``bad`` one that holds a NaN; ``more`` and ``keys`` are added.

    Matrices have the given types in turn, as in ("F16", "Q8_0").
    """
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

    rng = np.random.default_rng(0)
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *characters, "Ġ=", "ĊĊ"]
    kinds = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ =", "Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in (keys or {}).items():
        (writer.add_bool if isinstance(value, bool) else writer.add_string)(key, value)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}.weight": (WIDTH, WIDTH) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}.weight": (WIDTH // 2, WIDTH) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}.weight": (HIDDEN, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (WIDTH, HIDDEN)
    kind = itertools.cycle(GGMLQuantizationType[name] for name in types)
    for name, shape in (shapes | (more or {})).items():
        weight = rng.normal(0, 0.3, shape).astype(np.float32)
        if name == f"{bad}.weight":
            weight.flat[0] = np.nan
        if name == f"{without}.weight":
            continue
        if len(shape) > 1:
            stored_as = next(kind)
            writer.add_tensor(name, quantize(weight, stored_as), raw_dtype=stored_as)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
