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
    """Raise ValueError for a plain value (number, text, switch, choice, list) of the wrong type, nested values included."""
    hints = _type_hints(node.get("_target_")) if not OmegaConf.is_missing(node, "_target_") else {}
    for name in node:  # in a dictionary that is an argument, names may be numbers
        check_value(required_value(node, name, key), hints.get(str(name), Any), f"{key}.{name}")


def check_value(value: Any, hint: Any, key: str) -> None:
    """Raise ValueError if the value does not match the type hint, or is NaN. ``key`` is its config key."""
    if isinstance(value, DictConfig):
        check_types(value, key)
        return
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{key} must be a number of at most 64 bits, got one of {value.bit_length()} bits")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{key} must be {describe_hint(hint) or 'a number'}, got nan")
    if not matches_hint(value, hint):
        raise ValueError(f"{key} must be {describe_hint(hint)}, got {'null' if value is None else repr(value)}")


def matches_hint(value: Any, hint: Any) -> bool:
    """Return True if a YAML value (null, switch, number, text, list) matches the type hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(matches_hint(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint in (bool, str, NoneType):
        return isinstance(value, hint)
    if origin in (list, tuple, Sequence) and not isinstance(value, list):
        return False
    if origin in (list, Sequence):
        return all(matches_hint(item, arguments[0]) for item in value)
    return hint is not Tensor  # the component itself checks values that are not plain


def describe_hint(hint: Any) -> str:
    """Describe a type hint in words, as in ``a number or null``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(text for text in map(describe_hint, arguments) if text)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple, Sequence):
        return "a list, as in [a, b]"
    return PLAIN.get(hint, "")


def required_value(node: DictConfig, name: Any, key: str) -> Any:
    """Return the value. ValueError if it is missing; it names the key to set, through interpolations too."""
    if not OmegaConf.is_missing(node, name):
        return node[name]
    raw = OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, dict)
    source = raw[name].strip("${} ") if raw[name] != "???" else f"{key}.{name}"
    raise ValueError(f"{source} is missing: set {source}=...")


def check_arguments(component: partial[Any], key: str) -> None:
    """Raise ValueError for an argument that the function does not have. Otherwise the error would appear only at the call."""
    known = signature(component.func).parameters
    unknown = [name for name in component.keywords if name not in known]
    if unknown and not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values()):
        names = ", ".join(name for name in known if name not in ("params", "optimizer"))
        raise ValueError(f"{key}.{unknown[0]}: {component.func.__name__} has no such argument; it has {names}")


def check_takes_texts(reward: Any, key: str) -> None:
    """Raise ValueError if a reward cannot be called with one argument, the texts. Otherwise the error would appear after sampling."""
    try:
        parameters = signature(reward)
    except (TypeError, ValueError):  # a callable without a signature, such as one written in C
        return
    try:
        parameters.bind(object())
    except TypeError as error:
        raise ValueError(
            f"{key}: the reward is called with one argument, texts (texts.completions, texts.answers, ...), but its signature is "
            f"{parameters} ({error})"
        ) from error


def _type_hints(target: str | None) -> Mapping[str, Any]:
    """Return the type hints of the constructor or function. Empty if they cannot be resolved: instantiating reports a better error."""
    if target is None:
        return {}
    try:
        component = get_object(target)
        return get_type_hints(component.__init__ if isinstance(component, type) else component)
    except Exception:  # a user's module may raise any exception during import
        return {}
