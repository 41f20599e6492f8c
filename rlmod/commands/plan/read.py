"""The sizes of a run, read from its composed config."""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod.adapter.lora import LoRA
from rlmod.commands.plan.hardware import Hardware
from rlmod.commands.plan.run import Adapter, Model, Run, Sampling
from rlmod.commands.plan.shape import Shape, read_shape
from rlmod.config.validation import check_arguments, check_types, required_value
from rlmod.model.policy import HFPolicy

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
STRATEGIES = {
    "auto": "single",
    "ddp": "ddp",
    "lightning.pytorch.strategies.DDPStrategy": "ddp",
    "rlmod.strategy.fsdp.FSDP": "fsdp",
    "rlmod.strategy.fsdp2.FSDP2": "fsdp2",
}
STATES = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adagrad": 1, "RMSprop": 1, "Lion": 1}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Settings of a plan that a run's config does not have."""

    prompt_tokens: int | None = None
    """Tokens of the longest prompt; null: data.encoder.max_tokens."""
    mean_prompt_tokens: float | None = None
    """Mean prompt length, used only for times; null: the longest."""
    mean_completion_tokens: float | None = None
    """Mean completion length, used only for times; null: the longest."""
    held_out_problems: int | None = None
    """Problems of the largest validation set over all ranks; null: enough to fill validation.prompts_per_batch on each rank."""
    draws: float = 1.0
    """Prompts sampled per prompt that trains. With dynamic sampling: 1 / share of groups with signal."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "mean_prompt_tokens", "mean_completion_tokens", "held_out_problems"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"plan.{name} must be null or at least 1, got {value}")
        if self.draws < 1:
            raise ValueError(f"plan.draws must be at least 1, got {self.draws}")


def run_from_config(cfg: DictConfig) -> Run:
    """Return the sizes of the run. Raise ValueError that names the key if a value is invalid or not supported by the plan."""
    policy, batch, zero_reward = (instantiate_node(cfg, key) for key in ("policy", "batch", "zero_reward"))
    hardware: Hardware = instantiate_node(cfg, "hardware")
    lengths: Lengths = instantiate_node(cfg, "plan")
    ranks = _count(cfg, "trainer.devices") * _count(cfg, "trainer.num_nodes")
    per_prompt = whole_number(cfg, "sampler.completions_per_prompt")
    guided = (
        whole_number(cfg, "guide.completions_per_prompt", least=0)
        if cfg.guide and "completions_per_prompt" in cfg.guide
        else 0
    )
    if zero_reward.active and not cfg.guide:
        raise ValueError(
            f"zero_reward.weight={zero_reward.weight} needs a guide: set guide=policy or guide=demonstrations"
        )
    extra = zero_reward.max_rows(batch.prompts // ranks, ranks, per_prompt + guided)
    batch.micro_batches(per_prompt + guided, ranks, extra)
    prompts = batch.prompts // ranks
    zero_reward_groups = zero_reward.max_groups(prompts, ranks)
    prompt, completion = _longest_prompt(cfg, lengths), whole_number(cfg, "sampler.max_new_tokens")
    strategy, settings = _strategy(cfg, ranks)
    shape, width, autocast = _precision(cfg, policy)
    guide_rows, zero_reward_rows = prompts * guided, zero_reward_groups * zero_reward.completions_per_prompt
    return Run(
        shape=shape,
        weight_width=width,
        autocast=autocast,
        attention=policy.attention,
        checkpointing=policy.gradient_checkpointing,
        adapter=_adapter(policy, shape),
        strategy=strategy,
        ranks=ranks,
        reduced=strategy.startswith("fsdp") and settings.get("reduced_precision") is not None,
        offload=bool(settings.get("cpu_offload", False)),
        sharded_checkpoints=strategy == "fsdp" or bool(settings.get("sharded_checkpoints", False)),
        optimizer_states=_optimizer_states(cfg),
        prompt=prompt,
        completion=completion,
        mean_prompt=min(lengths.mean_prompt_tokens or prompt, prompt),
        mean_completion=min(lengths.mean_completion_tokens or completion, completion),
        draws=lengths.draws,
        prompts=prompts,
        on_policy_rows=prompts * per_prompt,
        guide_rows=guide_rows + zero_reward_rows,
        rollout_rows=prompts * per_prompt + guide_rows + extra,
        validation_rows=_validation_rows(cfg, ranks, lengths),
        minibatches=batch.minibatches,
        epochs=batch.epochs,
        micro_batch=batch.micro_batch,
        micro_batch_tokens=batch.micro_batch_tokens,
        entropy="entropy_bonus" in (cfg.get("regularizer") or {}),
        sampling=_sampling(cfg, prompts * per_prompt),
        guide=_separate_model(cfg.guide, "guide", max(guide_rows, zero_reward_rows)),
        reference=_separate_model(cfg.reference, "reference"),
        hardware=hardware,
    )


def instantiate_node(cfg: DictConfig, key: str) -> Any:
    """Check the types of a config node and instantiate it."""
    node = OmegaConf.select(cfg, key)
    check_types(node, key)
    return instantiate(node, _convert_="all")


def whole_number(cfg: DictConfig, key: str, least: int = 1) -> int:
    """Return a whole number of the config. Raise ValueError for any other value, and for one below ``least``."""
    parent, _, name = key.rpartition(".")
    value = required_value(OmegaConf.select(cfg, parent), name, parent)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key} must be a whole number, at least {least}, got {value!r}")
    return value


def _count(cfg: DictConfig, key: str) -> int:
    """Return a number of devices or nodes, which may also be given as a list."""
    value = OmegaConf.select(cfg, key)
    if OmegaConf.is_list(value):
        return len(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} must be a whole number for a plan, as in {key}=8, got {value!r}")
    return value


def _longest_prompt(cfg: DictConfig, lengths: Lengths) -> int:
    longest = lengths.prompt_tokens or OmegaConf.select(cfg, "data.encoder.max_tokens")
    if longest is None:
        raise ValueError(
            "data.encoder.max_tokens is null, so the length of prompts has no limit: set plan.prompt_tokens=N, the length of the longest"
        )
    if not isinstance(longest, int) or longest < 1:
        raise ValueError(f"data.encoder.max_tokens must be null or a whole number, at least 1, got {longest!r}")
    return longest


def _strategy(cfg: DictConfig, ranks: int) -> tuple[str, DictConfig]:
    node = cfg.trainer.get("strategy", "auto")
    settings = node if isinstance(node, DictConfig) else OmegaConf.create({})
    name = settings.get("_target_", node)
    if name not in STRATEGIES:
        raise ValueError(f"trainer.strategy={name}: the plan supports strategy=single, ddp, fsdp and fsdp2")
    known = STRATEGIES[name]
    return "ddp" if known == "single" and ranks > 1 else known, settings  # as Lightning's "auto" does


def _precision(cfg: DictConfig, policy: HFPolicy) -> tuple[Shape, int, bool]:
    """Return the policy's shape, the width of its weights, and True if autocast computes products in 16 bits."""
    precision = str(cfg.trainer.precision)
    known = {"32-true": None, "bf16-mixed": None, "16-mixed": None, "bf16-true": 2, "16-true": 2}
    if precision not in known:
        raise ValueError(f"trainer.precision={precision}: the plan supports {', '.join(known)}")
    return _shape(policy, "policy"), known[precision] or WIDTHS[policy.dtype], precision.endswith("-mixed")


def _shape(policy: HFPolicy, key: str) -> Shape:
    return read_shape(policy.base_location() if policy.is_adapter else policy.location, f"{key}.path")


def _adapter_config(policy: HFPolicy) -> dict[str, Any]:
    return (
        json.loads((Path(policy.location) / "adapter_config.json").read_text(encoding="utf-8"))
        if policy.is_adapter
        else {}
    )


def _adapter(policy: HFPolicy, shape: Shape) -> Adapter | None:
    if policy.is_adapter:
        saved = _adapter_config(policy)
        rank, targets = saved["r"], saved["target_modules"]
    elif policy.adapter is None:
        return None
    elif isinstance(policy.adapter, LoRA):
        rank, targets = policy.adapter.rank, policy.adapter.targets
    else:
        raise ValueError(
            f"policy.adapter={type(policy.adapter).__name__}: the plan supports adapter=none and adapter=lora"
        )
    named = list(shape.linears) if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
    if unknown := [name for name in named if name not in shape.linears]:
        raise ValueError(
            f"policy.adapter.targets holds {unknown[0]!r}, but the linear layers of this model are {', '.join(shape.linears)}"
        )
    return Adapter(rank=rank, targets=tuple(named))


def _sampling(cfg: DictConfig, rows: int) -> Sampling:
    """Return how the run samples. An engine takes a share of the accelerator's memory; one on a server takes none."""
    node = cfg.sampler
    if not str(node.get("_target_", "")).startswith("rlmod.sampler.vllm"):
        limit = None if node.get("rows_per_batch") is None else whole_number(cfg, "sampler.rows_per_batch")
        return Sampling(rows_per_batch=None if limit is None else min(limit, rows))
    on_server = bool(node.get("url"))
    share = node.get("gpu_memory_utilization")
    share = 0.0 if on_server else share
    if not isinstance(share, float | int) or not 0 <= share < 1:
        raise ValueError(f"sampler.gpu_memory_utilization must be at least 0 and below 1, got {share!r}")
    return Sampling(engine=True, share=float(share), sleeps=bool(node.get("sleep_while_training", False)))


def _validation_rows(cfg: DictConfig, ranks: int, lengths: Lengths) -> int:
    """Return the most rows that the validation of any set samples at once on a rank."""
    completions = [] if cfg.data.get("validation") is None else ["validation.sampler.completions_per_prompt"]
    for name, node in (cfg.get("benchmark") or {}).items():
        own = OmegaConf.is_dict(node) and node.get("completions_per_prompt") is not None
        completions.append(
            f"benchmark.{name}.completions_per_prompt" if own else "validation.sampler.completions_per_prompt"
        )
    if not completions:
        return 0
    prompts = whole_number(cfg, "validation.prompts_per_batch")
    if lengths.held_out_problems is not None:
        prompts = min(prompts, math.ceil(lengths.held_out_problems / ranks))
    rows = prompts * max(whole_number(cfg, key) for key in completions)
    key = "validation.sampler" if "rows_per_batch" in cfg.validation.sampler else "sampler"
    if OmegaConf.select(cfg, f"{key}.rows_per_batch") is None:
        return rows
    return min(whole_number(cfg, f"{key}.rows_per_batch"), rows)


def _separate_model(node: DictConfig | None, key: str, rows: int = 0) -> Model | None:
    """Return the separate model of a guide or a reference, or None if it has none. A moving average is stored in float32."""
    if not node or "policy" not in node:
        return None
    check_types(node.policy, f"{key}.policy")
    policy = instantiate(node.policy, _convert_="all")
    limit = OmegaConf.select(node, "sampler.rows_per_batch")
    is_average = str(node.get("_target_", "")).endswith(".EMA")
    return Model(
        shape=_shape(policy, f"{key}.policy"),
        width=4 if is_average else WIDTHS[policy.dtype],
        rows=min(rows, limit or rows),
    )


def _optimizer_states(cfg: DictConfig) -> int:
    """Return the numbers that the optimizer stores per parameter: known for torch's, otherwise measured by one step on a dummy vector."""
    check_types(cfg.optimizer, "optimizer")
    name, settings = str(cfg.optimizer._target_).rpartition(".")[2], cfg.optimizer
    build = instantiate(settings, _convert_="all")
    assert isinstance(build, partial)
    check_arguments(build, "optimizer")
    if get_object(settings._target_).__module__.startswith("torch.optim"):
        if name == "SGD":
            return int(bool(settings.get("momentum", 0)))
        if name in STATES:
            return STATES[name] + int(bool(settings.get("amsgrad", False)))
    vector = torch.nn.Parameter(torch.zeros(4096))
    vector.grad = torch.ones_like(vector)
    optimizer = build([vector])
    optimizer.step()
    return round(
        sum(v.numel() for v in optimizer.state[vector].values() if isinstance(v, torch.Tensor)) / vector.numel()
    )
