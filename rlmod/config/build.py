"""From the composed config to its components: everything that can be wrong before data and weights are loaded."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_type_hints

import hydra
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod.config.sizes import Batch, Validation
from rlmod.config.validation import check_arguments, check_types, check_value
from rlmod.interfaces import (
    Aggregation,
    Correction,
    Guide,
    Loss,
    Optimizer,
    Problems,
    Reference,
    Regularizer,
    Reward,
    Sampler,
    Shaper,
)
from rlmod.model.policy import HFPolicy
from rlmod.rollout.collect import Filter, ZeroReward
from rlmod.rollout.prompts import PromptEncoder


@dataclass(frozen=True, kw_only=True)
class Components:
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
    aggregation: Aggregation
    loss: Loss
    regularizer: Mapping[str, Regularizer]
    optimizer: Optimizer
    batch: Batch
    validation: Validation

    @property
    def rows_per_prompt(self) -> int:
        """Own completions and the guide's."""
        return self.sampler.completions_per_prompt + (self.guide.completions_per_prompt if self.guide else 0)

    @classmethod
    def of(cls, cfg: DictConfig) -> "Components":
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
            reward=build_reward(cfg.reward),
            filter=part("filter"),
            zero_reward=part("zero_reward"),
            reference=part("reference"),
            shaper=part("shaper"),
            correction=parts_of("correction"),
            aggregation=part("aggregation"),
            loss=part("loss"),
            regularizer=parts_of("regularizer"),
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
    return Validation(sampler=sampler, reward=build_reward(node.reward), **plain)


def _tried(optimizer: Optimizer) -> Optimizer:
    """Called once on a parameter of nobody's: what it refuses shows now, not when the policy's weights are loaded."""
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer: {error}") from error
    return optimizer


def build_reward(config: Mapping[Any, Any]) -> Reward:
    """The reward that a configuration describes.

    A class is instantiated. A plain function is the reward itself: the other keys become its arguments (a function that
    makes a reward says ``_partial_: false``). The same holds for the rewards inside ``terms``.
    """
    node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    targets = _functions_as_partials(OmegaConf.to_container(node, resolve=True), "reward")
    check_types(node, "reward")
    try:
        return hydra.utils.instantiate(targets, _convert_="all")
    except InstantiationException as error:
        # Hydra wraps what the constructor raised, whose own words name the key, and knows where in the tree it was.
        where = re.search(r"full_key: (\S+)", str(error))
        raise ValueError(f"reward{f'.{where[1]}' if where else ''}: {error.__cause__ or error}") from error


def _functions_as_partials(node: Any, key: str) -> dict[str, Any]:
    if not isinstance(node, dict) or not node.get("_target_"):
        raise ValueError(
            f"{key}._target_ is missing: the import path of a reward, such as rlmod.reward.exact_match.ExactMatch"
        )
    target = node["_target_"]
    try:
        resolved = hydra.utils.get_object(target)
    except Exception as error:  # whatever the user's module raises while it is imported
        module = target.rpartition(".")[0] or target
        raise ValueError(
            f"{key}._target_: cannot import {target!r}: {_cause(error)} (the module {module} is looked for in the "
            "current folder and in the installed packages)"
        ) from error
    node = dict(node)
    if inspect.isfunction(resolved):
        node.setdefault("_partial_", True)
    if isinstance(node.get("reward"), dict):  # one that builds on another
        node["reward"] = _functions_as_partials(node["reward"], f"{key}.reward")
    terms = node.get("terms")
    if isinstance(terms, dict):
        node["terms"] = {
            name: {**term, "reward": _functions_as_partials(term["reward"], f"{key}.terms.{name}.reward")}
            if isinstance(term, dict) and term.get("reward") is not None
            else term
            for name, term in terms.items()
        }
    return node


def _cause(error: BaseException) -> BaseException:
    """The exception at the root of it: Hydra wraps what an import raised, and says it over three lines."""
    return _cause(error.__cause__) if error.__cause__ else error
