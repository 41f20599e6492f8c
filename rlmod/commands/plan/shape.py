"""The sizes of a model, read from its config.json without weights and without transformers, whose import takes seconds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parent / "shapes"
"""Folder of the shapes that rlmod knows by name, so that a plan needs neither weights nor the hub."""

BIASES = {"qwen2": ("q_proj", "k_proj", "v_proj"), "mistral": (), "llama": None, "qwen3": None}
"""Supported architectures, and their linear layers with a bias; None: attention_bias and mlp_bias in the config decide."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder whose layers have two RMS norms, grouped-query attention and a gated MLP. All numbers count weights, not bytes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """True if the head shares the weights of the embedding."""
    biased: tuple[str, ...] = ()
    """The linear layers with a bias."""
    head_norms: bool = False
    """True if every head normalizes its queries and keys."""

    @property
    def queries(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys together, and of all values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer, as (input width, output width)."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_products(self) -> int:
        """Weights of a layer that take part in matrix products."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def layer(self) -> int:
        """All weights of a layer."""
        biases = sum(self.linears[name][1] for name in self.biased)
        return self.layer_products + biases + 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside layers: the embedding, the last norm, and the head unless it is tied."""
        return self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.root

    def lora(self, rank: int, targets: list[str]) -> int:
        """Return the number of weights of an adapter: rank (in + out) for each adapted linear layer."""
        return self.layers * sum(rank * sum(self.linears[name]) for name in targets)


def read_shape(location: str, key: str) -> Shape:
    """Read the shape from a folder with a config.json, a name that rlmod knows, or a name on the hub.

    Raise ValueError that names ``key`` if the shape cannot be read or the architecture is not supported.
    """
    file = _config_file(location, key)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{key}={location}: {file} is not valid JSON ({error})") from error
    kind = config.get("model_type")
    if kind not in BIASES:
        raise ValueError(
            f"{key}={location}: the plan supports the model types {', '.join(BIASES)}, and this model is of type {kind!r}"
        )
    try:
        return shape_from_config(config)
    except KeyError as error:
        raise ValueError(f"{key}={location}: {file} has no {error}") from error


def shape_from_config(config: dict[str, Any]) -> Shape:
    """Return the shape of a config.json. Raise KeyError for a missing size."""
    biased = BIASES[config["model_type"]]
    if biased is None:
        attention = ("q_proj", "k_proj", "v_proj", "o_proj") if config.get("attention_bias") else ()
        biased = attention + (("gate_proj", "up_proj", "down_proj") if config.get("mlp_bias") else ())
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        biased=biased,
        head_norms=config["model_type"] == "qwen3",
    )


def _config_file(location: str, key: str) -> Path:
    folder = Path(location)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{key}={location}: the folder has no config.json, from which the plan reads the model's sizes"
            )
        return folder / "config.json"
    known = SHAPES / f"{location.rpartition('/')[2].removesuffix('-Instruct')}.json"
    if known.is_file():
        return known
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(location, "config.json", etag_timeout=3))
    except Exception as error:  # network, unknown name, gated repository, or any other answer of the hub
        names = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
        raise ValueError(
            f"{key}={location}: cannot download config.json from the hub ({type(error).__name__}). Give a folder with a config.json "
            f"(no weights are needed), or one of the names that rlmod knows: {names}"
        ) from error
