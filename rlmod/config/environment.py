"""Configs in files and messages: no value of an environment variable is written, and nothing that is read is resolved."""

import os
import re
import threading
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

_PLACEHOLDER = "__environment_variable_{}__"
_SHORTEST_SECRET = 8
"""Characters of a value below which it is not replaced in messages: it would be found in words that have nothing to do with it."""
_lock = threading.Lock()
_resolved: dict[str, str] = {}
"""The values of the environment variables that a config has used, with their names."""


def _variable(name: str, *default: Any) -> Any:
    """Resolve ``${oc.env:NAME}`` as OmegaConf does, and remember the value."""
    value = oc.env(name, *default)
    if name in os.environ and len(os.environ[name]) >= _SHORTEST_SECRET:
        _resolved[os.environ[name]] = name
    return value


OmegaConf.register_new_resolver("oc.env", _variable, replace=True)


def redact(text: str) -> str:
    """Return a message with ``${oc.env:NAME}`` in place of the values of environment variables that a config has used."""
    for value in sorted(_resolved, key=len, reverse=True):
        text = text.replace(value, f"${{oc.env:{_resolved[value]}}}")
    return text


def resolve_without_environment(cfg: Any) -> Any:
    """Return the config as plain containers, with all interpolations resolved except ``${oc.env:NAME}``, which stays as it is.

    So a file with the result holds no secret, and comparing or printing a config that somebody else wrote reveals no variable.
    """
    names: dict[str, str] = {}

    def placeholder(*arguments: Any) -> str:
        text = ",".join("null" if argument is None else str(argument) for argument in arguments)
        return names.setdefault(text, _PLACEHOLDER.format(len(names)))

    with _lock:
        OmegaConf.register_new_resolver("oc.env", placeholder, replace=True)
        try:
            container = OmegaConf.to_container(cfg, resolve=True)
        finally:
            OmegaConf.register_new_resolver("oc.env", _variable, replace=True)
    texts = {value: f"${{oc.env:{name}}}" for name, value in names.items()}
    return _replace(container, texts) if texts else container


def read_config(path: Path) -> dict[str, Any]:
    """Read the config that a run wrote. ValueError that names the file if it cannot be read.

    Somebody else may have written it. Therefore nothing in it is resolved, such as ``${oc.env:NAME}``, and no ``_target_`` is imported.
    """
    try:
        cfg = OmegaConf.load(path)
        container = OmegaConf.to_container(cfg, resolve=False)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as the config of a run: {reason}") from error
    if not isinstance(container, dict):
        raise ValueError(f"{path} cannot be read as the config of a run: it holds a {type(container).__name__}")
    return {str(key): value for key, value in container.items()}


def select(config: Any, key: str) -> Any:
    """Return the value under a dotted key of plain containers, or None if there is none."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _replace(value: Any, texts: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replace(inner, texts) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replace(inner, texts) for inner in value]
    if isinstance(value, str):
        return re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], value)
    return value
