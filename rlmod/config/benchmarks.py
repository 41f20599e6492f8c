"""Benchmarks: named validation sets, each with a curve of its own."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf

from rlmod.config.sizes import Validation
from rlmod.config.validation import check_value
from rlmod.data._large import load_problems
from rlmod.interfaces import Problems, Sampler
from rlmod.rollout.prompts import EncodedProblems, PromptEncoder
from rlmod.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP = "benchmark"
LISTS = ("pass_at", "maj_at", "best_at")
NAME = r"[A-Za-z0-9_-]+"


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Settings of any benchmark, beside the keys of its problems. null: as in ``validation``."""

    completions_per_prompt: int | None = None
    pass_at: Sequence[int] | None = None
    maj_at: Sequence[int] | None = None
    best_at: Sequence[int] | None = None

    def apply(self, validation: Validation, name: str, numbers: Mapping[str, Sequence[int]]) -> Validation:
        """Return the settings of the validation for this benchmark, with the lists of ``numbers`` where its own are null.

        ValueError that names the key if they do not fit together.
        """
        own = {key: getattr(self, key) for key in LISTS}
        changed: dict[str, Any] = {key: numbers[key] if value is None else value for key, value in own.items()}
        if self.completions_per_prompt is not None:
            changed["sampler"] = _resized(validation.sampler, self.completions_per_prompt, name)
        return replace(validation, benchmark=name, **changed)


def _resized(sampler: Sampler, number: int, name: str) -> Sampler:
    """Return the sampler with another number of completions per prompt."""
    key = f"{GROUP}.{name}.completions_per_prompt"
    if number < 1:
        raise ValueError(f"{key} must be null or at least 1, got {number}")
    if number == sampler.completions_per_prompt:
        return sampler
    if not is_dataclass(sampler):
        raise ValueError(
            f"{key}={number}: validation.sampler is a {type(sampler).__name__}, which is no dataclass, so its number of completions "
            f"cannot be changed; leave {key} null, or make the sampler a dataclass"
        )
    return replace(cast(Any, sampler), completions_per_prompt=number)


def build_benchmarks(
    nodes: Any,
    validation: Validation,
    build: Callable[[str, DictConfig], Problems],
    numbers: Mapping[str, Sequence[int]] | None = None,
) -> tuple[dict[str, Problems], dict[str, Validation]]:
    """Return the problems and the settings of each benchmark, by name. ValueError that names the key if a value is wrong.

    ``build(key, node)`` builds the problems from the keys that are not ``BenchmarkSettings``. ``numbers`` replaces the validation's lists
    of k.
    """
    numbers = numbers or {key: getattr(validation, key) for key in LISTS}
    if nodes is None:
        return {}, {}
    package = f"a YAML of your own must begin with the line `# @package {GROUP}.NAME`"
    if not isinstance(nodes, DictConfig):
        raise ValueError(f"{GROUP}={nodes!r} must be a list of options, as in {GROUP}=[aime24,amc23]; {package}")
    problems: dict[str, Problems] = {}
    settings: dict[str, Validation] = {}
    for name in map(str, nodes):
        key, node = f"{GROUP}.{name}", nodes[name]
        if not isinstance(node, DictConfig):
            raise ValueError(f"{key} must be a set of problems, got {node!r}; {package}")
        if not re.fullmatch(NAME, name):
            raise ValueError(
                f"{key}: {name!r} cannot be part of a metric's name, as in val/{name}/mean@1; use letters, digits, - and _"
            )
        keys = cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
        hints = get_type_hints(BenchmarkSettings)
        given = {each: keys.pop(each) for each in hints if each in keys}
        for each, value in given.items():
            check_value(value, hints[each], f"{key}.{each}")
        if not keys.get("_target_"):
            raise ValueError(
                f"{key}._target_ is missing: give a source of problems, as in rlmod.data.problem_file.ProblemFile"
            )
        with naming_benchmark(name):
            problems[name] = build(key, OmegaConf.create(keys))
        settings[name] = BenchmarkSettings(**given).apply(validation, name, numbers)
    return problems, settings


@contextmanager
def naming_benchmark(name: str) -> Iterator[None]:
    """Name the benchmark in a ValueError about its problems, and its keys in place of those of ``data``."""
    key = f"{GROUP}.{name}"
    try:
        yield
    except (ValueError, InstantiationException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if not isinstance(cause, ValueError):
            raise
        own_keys = re.sub(r"(data\.\w+)(?: \(or data\.validation_\w+\))", r"\1", str(cause))
        message = re.sub(r"\bdata\.(?!encoder|unreadable_answer|validation)(\w+)", rf"{key}.\1", own_keys)
        raise ValueError(message if key in message else f"{key}: {message}") from error


def load_benchmarks(problems: Mapping[str, Problems], seconds: float) -> dict[str, Sequence[Problem]]:
    """Return the problems of each benchmark, as ``load_problems`` does. ValueError that names the benchmark if they cannot be read."""
    loaded: dict[str, Sequence[Problem]] = {}
    for name, read in problems.items():
        with naming_benchmark(name):
            loaded[name] = load_problems(read, seconds)
    return loaded


def encode_benchmarks(
    sets: Mapping[str, Sequence[Problem]], encoder: PromptEncoder, tokenizer: "PreTrainedTokenizerBase", seconds: float
) -> dict[str, EncodedProblems]:
    """Return the tokenized problems of each benchmark. ValueError that names the benchmark if they cannot be encoded."""
    encoded: dict[str, EncodedProblems] = {}
    for name, problems in sets.items():
        with naming_benchmark(name):
            encoded[name] = encoder.encode(problems, tokenizer, seconds)
    return encoded


def check_options(overrides: Sequence[str], nodes: Any, folders: Sequence[Path]) -> None:
    """Raise ValueError for options of ``benchmark=[...]`` that do not each give one set, under their own name.

    ``folders`` are the config folders; of an option's file in several of them Hydra reads the first one only.
    """
    for options in _chosen(overrides):
        shown = f"{GROUP}=[{','.join(options)}]"
        if twice := [option for option in options if options.count(option) > 1]:
            raise ValueError(f"{shown}: {twice[0]} is given twice; give each set once, and another set another name")
        for option in options:
            found = [file for folder in folders if (file := folder / GROUP / f"{option}.yaml").is_file()]
            if len(found) > 1:
                raise ValueError(
                    f"{shown}: there are two files of the name {option}, {' and '.join(map(str, found))}, and only the first would be "
                    "read; give yours another name, in its `# @package` line too"
                )
            if not isinstance(nodes, DictConfig) or option not in nodes:
                raise ValueError(
                    f"{shown}: {option}.yaml gives no set of the name {option}; its first line must be `# @package {GROUP}.{option}`, "
                    "and the name must have letters, digits, - and _ only"
                )


def _chosen(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Yield the options of each override of the group."""
    for text in overrides:
        if not text.lstrip("+").startswith(f"{GROUP}="):
            continue
        try:
            value = OverridesParser.create().parse_override(text).value()
        except HydraException:  # composing has reported it
            continue
        if isinstance(value, str | list):
            yield [str(option) for option in ([value] if isinstance(value, str) else value)]
