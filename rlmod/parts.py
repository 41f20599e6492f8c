"""From the composed config to its components: everything that can be wrong before data and weights are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_type_hints

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod.collect import Filter, ZeroReward
from rlmod.fields import check_arguments, check_types, check_value
from rlmod.interfaces import (
    Correction,
    Guide,
    Loss,
    Optimizer,
    Penalty,
    Problems,
    Reference,
    Reward,
    Sampler,
    Shaper,
    Weighting,
)
from rlmod.policy import HFPolicy
from rlmod.prompts import PromptEncoder
from rlmod.scoring import build
from rlmod.settings import Batch, Validation


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components of a training run; the fields stand in the order of the data, as the groups in conf/train.yaml do."""

    policy: HFPolicy
    train: Problems
    held_out: Problems | None
    encoder: PromptEncoder
    sampler: Sampler
    guide: Guide | None
    reward: Reward
    filter: Filter
    zero_reward: ZeroReward
    reference: Reference | None
    shaper: Shaper
    correction: Mapping[str, Correction]
    weighting: Weighting
    loss: Loss
    penalty: Mapping[str, Penalty]
    optimizer: Optimizer
    batch: Batch
    validation: Validation

    @property
    def rows_per_prompt(self) -> int:
        """Own completions and the guide's."""
        return self.sampler.completions_per_prompt + (self.guide.completions_per_prompt if self.guide else 0)

    @classmethod
    def of(cls, cfg: DictConfig) -> "Parts":
        def part(key: str, node: Any = None) -> Any:
            node = OmegaConf.select(cfg, key) if node is None else node
            if node is None:
                return None
            check_types(node, key)
            made = instantiate(node, _convert_="all")
            if isinstance(made, partial):
                check_arguments(made, key)
            return made

        def parts_of(group: str) -> dict[str, Any]:
            return {str(name): part(f"{group}.{name}") for name in OmegaConf.select(cfg, group) or {}}

        return cls(
            policy=part("policy"),
            train=part("data.train"),
            held_out=part("data.validation"),
            encoder=part("data.encoder"),
            sampler=part("sampler"),
            guide=part("guide"),
            reward=build(cfg.reward),
            filter=part("filter"),
            zero_reward=part("zero_reward"),
            reference=part("reference"),
            shaper=part("shaper"),
            correction=parts_of("correction"),
            weighting=part("weighting"),
            loss=part("loss"),
            penalty=parts_of("penalty"),
            optimizer=_tried(part("optimizer")),
            batch=part("batch"),
            validation=_validation(cfg.validation, part("validation.sampler", _validation_sampler(cfg))),
        )


def _validation_sampler(cfg: DictConfig) -> DictConfig:
    """What validation.sampler leaves open is as in training, as an engine's settings, which the two then share."""
    given = cfg.validation.sampler
    same = OmegaConf.select(given, "_target_") == OmegaConf.select(cfg.sampler, "_target_")
    resolved = OmegaConf.create(cast(dict[str, Any], OmegaConf.to_container(given, resolve=True)))
    return cast(DictConfig, OmegaConf.merge(cfg.sampler, resolved) if same else given)


def _validation(node: DictConfig, sampler: Sampler) -> Validation:
    hints = get_type_hints(Validation)
    plain = {name: node[name] for name in ("threshold", "pass_at", "prompts_per_batch", "seed")}
    for name, value in plain.items():
        check_value(value, hints[name], f"validation.{name}")
    return Validation(sampler=sampler, reward=build(node.reward), **plain)


def _tried(optimizer: Optimizer) -> Optimizer:
    """Called once on a parameter of nobody's: what it refuses shows now, not when the policy's weights are loaded."""
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer: {error}") from error
    return optimizer
