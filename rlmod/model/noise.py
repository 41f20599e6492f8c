"""Noise in a model's training mode: dropout, and the jitter of a mixture's router.

With noise, pi_theta of the first update differs from pi_old although the weights are the same, and the ratios do not begin at 1.
"""

from collections.abc import Iterator

from torch import nn

SUFFIXES = ("dropout", "pdrop", "dropout_p", "dropout_prob", "drop_rate", "jitter_noise")
"""Endings of the names under which transformers' models keep a rate of noise."""


def rates(policy: nn.Module) -> dict[str, float]:
    """Return the rates of noise above 0, by the names of the modules and settings that have them."""
    return {f"{place}.{name}".lstrip("."): rate for place, _, name, rate in _settings(policy)}


def switch_off(policy: nn.Module) -> None:
    """Set every rate of noise to 0, in the modules and in the config that some of them read; an adapter's own dropout stays."""
    for place, owner, name, _ in list(_settings(policy)):
        if "lora_" not in place:
            setattr(owner, name, 0.0)


def _settings(policy: nn.Module) -> Iterator[tuple[str, object, str, float]]:
    config = getattr(policy, "config", None)
    owners = [("config", config)] if config is not None else []
    owners += list(policy.named_modules())
    for place, owner in owners:
        for name, value in vars(owner).items():
            named = name.endswith(SUFFIXES) or (name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd))
            if named and isinstance(value, float) and value > 0:
                yield place, owner, name, value
