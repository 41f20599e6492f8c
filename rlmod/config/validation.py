"""Check config values against the type hints of the component they belong to."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

PLAIN: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def check_types(node: DictConfig, key: str) -> None:
    """ValueError for a plain value (number, text, switch, choice, list) that its component does not take; nested ones too."""
    hints = _hints(node.get("_target_")) if not OmegaConf.is_missing(node, "_target_") else {}
    for name in map(str, node):
        check_value(given(node, name, key), hints.get(name, Any), f"{key}.{name}")


def check_value(value: Any, hint: Any, key: str) -> None:
    if isinstance(value, DictConfig):
        check_types(value, key)
        return
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{key} must be {described(hint) or 'a number'}, got nan")
    if not fits(value, hint):
        raise ValueError(f"{key} must be {described(hint)}, got {'null' if value is None else repr(value)}")


def fits(value: Any, hint: Any) -> bool:
    """Return True if a YAML value (null, switch, number, text, list) matches the type hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint in (bool, str, NoneType):
        return isinstance(value, hint)
    if origin in (list, tuple, Sequence) and not isinstance(value, list):
        return False
    if origin in (list, Sequence):
        return all(fits(item, arguments[0]) for item in value)
    return hint is not Tensor  # of what is no plain value, the component itself is the judge


def described(hint: Any) -> str:
    """Describe a type hint in words, as in ``a number or null``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(text for text in map(described, arguments) if text)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple, Sequence):
        return "a list, as in [a, b]"
    return PLAIN.get(hint, "")


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


def _hints(target: str | None) -> Mapping[str, Any]:
    """Return the type hints of the constructor, or the function; none if they cannot be resolved: the component's own error says more."""
    if target is None:
        return {}
    try:
        made = get_object(target)
        return get_type_hints(made.__init__ if isinstance(made, type) else made)
    except Exception:  # whatever a user's module raises when it is imported: instantiating it says so better
        return {}
