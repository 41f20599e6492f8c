"""Noise of a model in training mode: dropout, and the router jitter of a mixture of experts.

With noise, pi_theta differs from pi_old in the first update although the weights are the same, so the ratios do not begin at 1.
"""

from collections.abc import Iterator

from torch import nn

SUFFIXES = ("dropout", "pdrop", "dropout_p", "dropout_prob", "drop_rate", "jitter_noise")
"""Suffixes of the attributes in which transformers' models store a rate of noise."""


def rates(policy: nn.Module) -> dict[str, float]:
    """Return the rates of noise above 0, by the dotted name of the module or config attribute."""
    return {f"{place}.{name}".lstrip("."): rate for place, _, name, rate in _nonzero_rates(policy)}


def switch_off(policy: nn.Module) -> None:
    """Set every rate of noise to 0, in the modules and in the config, which some modules read. A LoRA adapter keeps its dropout."""
    for place, owner, name, _ in list(_nonzero_rates(policy)):
        if "lora_" not in place:
            setattr(owner, name, 0.0)


def _nonzero_rates(policy: nn.Module) -> Iterator[tuple[str, object, str, float]]:
    config = getattr(policy, "config", None)
    owners = [("config", config)] if config is not None else []
    owners += list(policy.named_modules())
    for place, owner in owners:
        for name, value in vars(owner).items():
            named = name.endswith(SUFFIXES) or (name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd))
            if named and isinstance(value, float) and value > 0:
                yield place, owner, name, value
