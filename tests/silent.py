"""A sampler that tells nothing of what it knows, as engines do that report no more than tokens."""

from dataclasses import dataclass, replace

from rlmod.sampler.hf import HF


@dataclass(frozen=True, kw_only=True)
class Silent(HF):
    def __call__(self, policy, prompts, seed):  # pyright: ignore[reportIncompatibleMethodOverride]
        return replace(super().__call__(policy, prompts, seed), logprobs=None, entropy=None, sampler_logprobs=None)


@dataclass(frozen=True, kw_only=True)
class Engine(HF):
    """A sampler that wants to be given weights."""

    max_difference: float = 0.1

    def sync(self, policy):
        pass

    def sleep(self):
        pass
