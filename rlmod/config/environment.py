"""A config resolved for a file, without the values of environment variables, which may be secrets."""

import re
import threading
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

_PLACEHOLDER = "__environment_variable_{}__"
_lock = threading.Lock()


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
            OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    texts = {value: f"${{oc.env:{name}}}" for name, value in names.items()}
    return _replace(container, texts) if texts else container


def _replace(value: Any, texts: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replace(inner, texts) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replace(inner, texts) for inner in value]
    if isinstance(value, str):
        return re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], value)
    return value
