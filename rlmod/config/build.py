"""Build and check the components of a composed config, before data and weights are loaded."""

import inspect
import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast, get_args, get_type_hints

import hydra
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod.config.benchmarks import build_benchmarks
from rlmod.config.sizes import Batch, Guard, Validation
from rlmod.config.validation import check_arguments, check_takes_texts, check_types, check_value
from rlmod.data._store import answers_of
from rlmod.interfaces import (
    Aggregation,
    AnswerReader,
    Correction,
    Filter,
    Guide,
    Loss,
    Optimizer,
    Problems,
    PromptGuide,
    Reference,
    Regularizer,
    Reward,
    Sampler,
    Shaper,
    check_declarations,
    component_name,
    declared,
)
from rlmod.model.policy import HFPolicy
from rlmod.reward._failures import RewardSettings
from rlmod.reward._supervised import Supervised
from rlmod.rollout.prompts import EncodedProblems, PromptEncoder, UnreadableAnswer
from rlmod.rollout.zero_reward import ZeroReward
from rlmod.types import accepted_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Components:
    """The components of a training run, in the order of the data, like the groups in conf/train.yaml."""

    policy: HFPolicy
    train: Problems
    held_out: Problems | None
    encoder: PromptEncoder
    unreadable_answer: UnreadableAnswer
    sampler: Sampler
    guide: Guide | PromptGuide | None
    reward: Reward
    filter: Filter
    zero_reward: ZeroReward
    threshold: float
    reference: Reference | None
    shaper: Shaper
    correction: Mapping[str, Correction]
    aggregation: Aggregation
    loss: Loss
    regularizer: Mapping[str, Regularizer]
    optimizer: Optimizer
    batch: Batch
    guard: Guard
    validation: Validation
    benchmark_problems: Mapping[str, Problems]
    """Problems of each benchmark, by name."""
    benchmark: Mapping[str, Validation]
    """Settings of each benchmark: the validation's, with its own numbers."""

    @property
    def completions_per_prompt(self) -> int:
        """Completions per prompt: on-policy ones and the guide's."""
        return self.sampler.completions_per_prompt + (self.guide.completions_per_prompt if self.guide else 0)

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Components":
        """Build the components of a composed config. ValueError that names the key if a value is wrong."""
        check_value(cfg.threshold, float, "threshold")
        build, build_all = partial(_build, cfg), partial(_build_all, cfg)
        validation = _build_validation(cfg.validation, build("validation.sampler", _validation_sampler(cfg)))
        benchmark_problems, benchmark = build_benchmarks(cfg.get("benchmark"), validation, build_problems)
        return cls(
            policy=build("policy"),
            train=build("data.train"),
            held_out=build("data.validation"),
            encoder=build("data.encoder"),
            unreadable_answer=unreadable_answer(cfg),
            sampler=build("sampler"),
            guide=build("guide"),
            reward=build_reward(cfg.reward),
            filter=build("filter"),
            zero_reward=build("zero_reward"),
            threshold=cfg.threshold,
            reference=build("reference"),
            shaper=build("shaper"),
            correction=build_all("correction"),
            aggregation=build("aggregation"),
            loss=build("loss"),
            regularizer=build_all("regularizer"),
            optimizer=_dry_run(build("optimizer")),
            batch=build("batch"),
            guard=build("guard"),
            validation=validation,
            benchmark_problems=benchmark_problems,
            benchmark=benchmark,
        )


def _build(cfg: DictConfig, key: str, node: Any = None) -> Any:
    """Return the component under this key of the config, or the one of ``node``; None if there is none and the key is optional."""
    node = OmegaConf.select(cfg, key) if node is None else node
    if node is None:
        if key in OPTIONAL:
            return None
        raise ValueError(f"{key}=null: a run cannot do without it; leave {key} out, or give another option")
    check_types(_require_node(node, key), key)
    try:
        component = instantiate(node, _convert_="all")
    except InstantiationException as error:
        target = node.get("_target_")
        if key.split(".")[0] in STAGES and _is_function(target) and not node.get("_partial_"):
            raise ValueError(
                f"{key}: {target} is a function and was called while the config was read ({error.__cause__ or error}); if the "
                "function itself is the component, add `_partial_: true` to its YAML"
            ) from error
        raise
    if isinstance(component, partial):
        check_arguments(component, key)
    protocol = STAGES.get(key.split(".")[0])
    if protocol is not None and not isinstance(component, protocol):
        name = " or ".join(each.__name__ for each in get_args(protocol) or (protocol,))
        raise ValueError(
            f"{key}: {node.get('_target_')} gives an object of type {type(component).__name__}, which is no {name}: "
            f"rlmod/interfaces.py says what a {name} must have"
        )
    return component


def build_problems(key: str, node: DictConfig) -> Problems:
    """Return the problems of a config node. ValueError that names the key if a value is wrong."""
    return _build(OmegaConf.create(), key, node)


OPTIONAL = ("data.validation", "guide", "reference")

STAGES: dict[str, Any] = {
    "benchmark": Problems,
    "sampler": Sampler,
    "guide": Guide | PromptGuide,
    "filter": Filter,
    "reference": Reference,
    "shaper": Shaper,
    "correction": Correction,
    "aggregation": Aggregation,
    "loss": Loss,
    "regularizer": Regularizer,
}
"""The Protocol of each stage. The reward has its own builder."""


def _build_all(cfg: DictConfig, group: str) -> dict[str, Any]:
    """Return the components of a group that takes several, by name."""
    nodes = OmegaConf.select(cfg, group)
    if nodes is None:
        return {}
    if not isinstance(nodes, DictConfig):
        raise ValueError(
            f"{group}={nodes!r} must be a list of options, as in {group}=[{nodes}]; {_package_line(group)}"
        )
    for name, node in nodes.items():
        if not isinstance(node, DictConfig):
            raise ValueError(f"{group}.{name} must be a component, got {node!r}; {_package_line(group)}")
    return {str(name): _build(cfg, f"{group}.{name}") for name in nodes}


def _package_line(group: str) -> str:
    return f"a YAML of your own for {group} must begin with the line `# @package {group}.NAME`, so that several can be combined"


def _is_function(target: str | None) -> bool:
    try:
        return target is not None and inspect.isfunction(hydra.utils.get_object(target))
    except Exception:  # an import error: instantiating the component reports it with the key
        return False


def _require_node(node: Any, key: str) -> DictConfig:
    """Return the node. ValueError if there is a plain value instead, such as batch=large: some nodes have no options to choose from."""
    if isinstance(node, DictConfig):
        return node
    raise ValueError(
        f"{key}={node}: {key} has no options to choose from, only keys; set a key, as in {key}.KEY=VALUE; "
        f"`rlmod-train --help` lists them"
    )


def _validation_sampler(cfg: DictConfig) -> DictConfig:
    """Fill the missing keys of validation.sampler, such as an engine's settings, from the training sampler if both have the same class."""
    node = _require_node(_require_node(cfg.validation, "validation").sampler, "validation.sampler")
    same_class = OmegaConf.select(node, "_target_") == OmegaConf.select(cfg.sampler, "_target_")
    resolved = OmegaConf.create(cast(dict[str, Any], OmegaConf.to_container(node, resolve=True)))
    return cast(DictConfig, OmegaConf.merge(cfg.sampler, resolved) if same_class else node)


def _build_validation(node: DictConfig, sampler: Sampler) -> Validation:
    hints = get_type_hints(Validation)
    plain = {name: node[name] for name in ("threshold", "pass_at", "maj_at", "best_at", "prompts_per_batch", "seed")}
    for name, value in plain.items():
        check_value(value, hints[name], f"validation.{name}")
    return Validation(sampler=sampler, reward=build_reward(node.reward, "validation.reward"), **plain)


def _dry_run(optimizer: Optimizer) -> Optimizer:
    """Call the optimizer once on a dummy parameter, to report a refused argument before the policy's weights are loaded."""
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer: {error}") from error
    return optimizer


REWARD_SETTINGS = get_type_hints(RewardSettings)
"""Keys that any reward accepts; a reward that has no such field is wrapped in Supervised."""


def build_reward(config: Any, key: str = "reward") -> Reward:
    """Build the reward of a config. ValueError that names the key if it cannot be imported or built.

    A class is instantiated. A plain function is the reward itself, and the other keys are its arguments; a function that returns a reward
    needs ``_partial_: false``. The same holds for the rewards inside ``terms``. The keys of ``RewardSettings``, such as ``on_error``, are
    settings of any reward.
    """
    if not isinstance(config, Mapping | DictConfig):
        raise ValueError(f"{key}={'null' if config is None else config}: give a reward, as in reward=exact_match")
    node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    targets = _functions_as_partials(OmegaConf.to_container(node, resolve=True), key)
    check_types(node, key)
    try:
        reward = hydra.utils.instantiate(targets, _convert_="all")
    except InstantiationException as error:
        # Hydra wraps the constructor's exception and adds its place in the tree.
        where = re.search(r"full_key: (\S+)", str(error))
        raise ValueError(f"{key}{f'.{where[1]}' if where else ''}: {error.__cause__ or error}") from error
    for place, each in _iter_rewards(reward, key):
        if isinstance(each, partial):
            check_arguments(each, place)
        check_takes_texts(each, place)
        check_declarations(each, place)
    return reward


def find_unreadable(problems: EncodedProblems, reward: Reward) -> dict[int, str]:
    """Return the answers that the reward, or one inside it, cannot read, with the reason, by the index of the problem.

    ValueError for a problem without an answer, if the reward compares with one.
    """
    check_answers(problems, reward)
    unreadable: dict[int, str] = {}
    for each in answer_readers(reward):
        unreadable = {**each.find_unreadable(problems.problems), **unreadable}
    return unreadable


def check_answers(problems: EncodedProblems, reward: Reward) -> None:
    """Raise ValueError if a problem has no answer, but the reward, or one inside it, compares with one."""
    comparing = [(key, each) for key, each in _iter_rewards(reward, "reward") if declared(each, "needs_answer")]
    if not comparing:
        return
    answers = itertools.chain.from_iterable(answers_of(problems.problems))
    for index, answer in enumerate(answers):
        if not accepted_answers(answer):
            key, each = comparing[0]
            raise ValueError(
                f"{problems.problems[index].source}: the problem has no answer (data.answer_field=null), "
                f"but {key}={component_name(each)} compares with it: "
                "name the field with data.answer_field, or choose a reward that needs no answer"
            )


def answer_readers(reward: Reward) -> list[AnswerReader]:
    """Return the reward and those inside it that may be unable to read an answer."""
    return [each for _, each in _iter_rewards(reward, "reward") if isinstance(each, AnswerReader)]


def unreadable_answer(cfg: DictConfig) -> UnreadableAnswer:
    """Return ``data.unreadable_answer``; ``error`` if the data's own YAML does not have it."""
    treatment = OmegaConf.select(cfg, "data.unreadable_answer", default="error")
    check_value(treatment, UnreadableAnswer, "data.unreadable_answer")
    return treatment


def check_completion_prefix(reward: Reward, problems: EncodedProblems, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError if a prompt does not end in the reward's ``completion_prefix``, or in that of a reward inside it.

    Log a warning if no reward sees a tag such as ``<think>`` with which the prompts end: none could find a pair of them.
    """
    prefixes = {key: prefix for key, each in _iter_rewards(reward, "reward") if (prefix := _prefix(each))}
    for key, prefix in prefixes.items():
        problems.check_endings(prefix, tokenizer, f"{key}.completion_prefix")
    tag = problems.opened_tag(tokenizer)
    if tag is not None and not prefixes:
        log.warning(
            "the prompts end in %s, so the reward's completions do not hold it; 'reward.completion_prefix=\"%s\"' puts it there",
            *(tag, tag),
        )


def _prefix(reward: Any) -> str:
    return reward.completion_prefix if isinstance(reward, RewardSettings) else ""


def _iter_rewards(reward: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the reward and those inside it, with their keys."""
    yield key, reward
    if isinstance(reward, Supervised):
        yield from _iter_rewards(reward.supervised, key)
    elif isinstance(terms := getattr(reward, "terms", None), Mapping):
        for name, term in terms.items():
            yield from _iter_rewards(term["reward"], f"{key}.terms.{name}.reward")
    elif callable(inner := getattr(reward, "reward", None)):
        yield from _iter_rewards(inner, f"{key}.reward")


def _functions_as_partials(node: Any, key: str) -> dict[str, Any]:
    if not isinstance(node, dict) or not node.get("_target_"):
        raise ValueError(
            f"{key}._target_ is missing: give the import path of a reward, such as rlmod.reward.exact_match.ExactMatch"
        )
    target = node["_target_"]
    try:
        resolved = hydra.utils.get_object(target)
    except Exception as error:  # the user's module may raise any exception during import
        module = target.rpartition(".")[0] or target
        raise ValueError(
            f"{key}._target_: cannot import {target!r}: {_root_cause(error)} (the module {module} is looked for in the "
            "current folder and in the installed packages)"
        ) from error
    node = dict(node)
    if key != "reward" and node.get("skip_special_tokens"):
        raise ValueError(
            f"{key}.skip_special_tokens=true has no effect inside another reward: completions are decoded once, for the whole reward; set "
            "reward.skip_special_tokens=true"
        )
    if inspect.isfunction(resolved):
        node.setdefault("_partial_", True)
    accepted = inspect.signature(resolved).parameters
    settings = {name: node.pop(name) for name in REWARD_SETTINGS if name in node and name not in accepted}
    if isinstance(node.get("reward"), dict):  # a reward that wraps another one
        node["reward"] = _functions_as_partials(node["reward"], f"{key}.reward")
    terms = node.get("terms")
    if isinstance(terms, dict):
        node["terms"] = {
            name: {**term, "reward": _functions_as_partials(term["reward"], f"{key}.terms.{name}.reward")}
            if isinstance(term, dict) and term.get("reward") is not None
            else term
            for name, term in terms.items()
        }
    for name, value in settings.items():
        check_value(value, REWARD_SETTINGS[name], f"{key}.{name}")
    settings = {name: value for name, value in settings.items() if value != getattr(RewardSettings, name)}
    if not settings:
        return node
    return {"_target_": "rlmod.reward._supervised.Supervised", "supervised": node, **settings}


def _root_cause(error: BaseException) -> BaseException:
    """Return the root cause. Hydra wraps an import error in a message of three lines."""
    return _root_cause(error.__cause__) if error.__cause__ else error
