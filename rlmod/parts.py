"""From the composed config to its components: everything that can be wrong before data and weights are loaded."""

from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from rlmod.collect import Filter
from rlmod.interfaces import Guide, Loss, Optimizer, Problems, Reward, Sampler, Schedule, Shaper, Weighting
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
    shaper: Shaper
    weighting: Weighting
    loss: Loss
    optimizer: Optimizer
    schedule: Schedule | None
    batch: Batch
    validation: Validation

    @classmethod
    def of(cls, cfg: DictConfig) -> "Parts":
        def part(key: str) -> Any:
            node = cfg[key] if "." not in key else cfg[key.split(".")[0]][key.split(".")[1]]
            return None if node is None else instantiate(node, _convert_="all")

        return cls(
            policy=part("policy"),
            train=part("data.train"),
            held_out=part("data.validation"),
            encoder=part("data.encoder"),
            sampler=part("sampler"),
            guide=part("guide"),
            reward=build(cfg.reward),
            filter=part("filter"),
            shaper=part("shaper"),
            weighting=part("weighting"),
            loss=part("loss"),
            optimizer=part("optimizer"),
            schedule=part("schedule"),
            batch=part("batch"),
            validation=Validation(
                sampler=part("validation.sampler"),
                reward=build(cfg.validation.reward),
                threshold=cfg.validation.threshold,
                pass_at=list(cfg.validation.pass_at),
                seed=cfg.validation.seed,
            ),
        )
