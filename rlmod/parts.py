"""From the composed config to its components: everything that can be wrong before data and weights are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod.collect import Filter, ZeroReward
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
        def part(key: str) -> Any:
            node = OmegaConf.select(cfg, key)
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
            optimizer=part("optimizer"),
            batch=part("batch"),
            validation=Validation(
                sampler=part("validation.sampler"),
                reward=build(cfg.validation.reward),
                threshold=cfg.validation.threshold,
                pass_at=list(cfg.validation.pass_at),
                seed=cfg.validation.seed,
            ),
        )


PLAIN: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def check_types(node: DictConfig, key: str) -> None:
    """ValueError for a plain field (number, text, switch, choice) of one of our dataclasses that holds something else."""
    if not str(node.get("_target_", "")).startswith("rlmod."):
        return
    hints = get_type_hints(get_class(node._target_).__init__)
    for name in node:
        value = given(node, str(name), key)
        if isinstance(value, DictConfig):
            check_types(value, f"{key}.{name}")
        if value is None or name not in hints:
            continue
        if get_origin(hints[name]) is Literal:
            if value not in get_args(hints[name]):
                raise ValueError(f"{key}.{name} must be one of {', '.join(get_args(hints[name]))}, got {value!r}")
            continue
        wanted = [kind for kind in get_args(hints[name]) or [hints[name]] if kind is not NoneType]
        if len(wanted) == 1 and wanted[0] in PLAIN and not _is(value, wanted[0]):
            raise ValueError(f"{key}.{name} must be {PLAIN[wanted[0]]}, got {value!r}")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def given(node: DictConfig, name: str, key: str) -> Any:
    """The value; ValueError naming the key that is to be given where it is missing, behind interpolations too."""
    if not OmegaConf.is_missing(node, name):
        return node[name]
    raw = OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, dict)
    source = raw[name].strip("${} ") if raw[name] != "???" else f"{key}.{name}"
    raise ValueError(f"{source} is missing: give it, as {source}=...")


def check_arguments(made: partial[Any], key: str) -> None:
    """ValueError for an argument that the function does not have, which would show only when it is called."""
    known = signature(made.func).parameters
    unknown = [name for name in made.keywords if name not in known]
    if unknown and not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values()):
        names = ", ".join(name for name in known if name not in ("params", "optimizer"))
        raise ValueError(f"{key}.{unknown[0]}: {made.func.__name__} has no such argument; it has {names}")
