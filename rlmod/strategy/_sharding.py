"""Operations that a sharding strategy needs in addition to Lightning's."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Sharding(Protocol):
    def shard(self, policy: nn.Module) -> nn.Module:
        """Shard the policy's weights over the ranks. A policy that is already sharded is returned unchanged."""
        ...

    def gather_full_parameters(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """Yield the policy with all its weights on every rank, so that ranks may run different numbers of forward passes."""
        ...

    def full_precision_policy(self, policy: nn.Module) -> nn.Module:
        """Return a policy with its weights in the dtype they are trained in: full tensors, or DTensors. Every rank calls this."""
        ...

    def full_state_dict(self, policy: nn.Module) -> tuple[nn.Module, dict[str, Tensor] | None]:
        """Return what rank 0 saves: a policy, and its full weights if it holds only a shard. Every rank calls this."""
        ...

    def gradient_norm(self, policy: nn.Module) -> Tensor:
        """Return the norm of the full gradient."""
        ...


@contextmanager
def gather_full_parameters(strategy: object, policy: nn.Module) -> Iterator[nn.Module]:
    if isinstance(strategy, Sharding):
        with strategy.gather_full_parameters(policy) as unsharded:
            yield unsharded
    else:
        yield policy


def full_precision_policy(strategy: object, policy: nn.Module) -> nn.Module:
    return strategy.full_precision_policy(policy) if isinstance(strategy, Sharding) else policy


def gradient_norm(strategy: object, policy: nn.Module) -> Tensor:
    if isinstance(strategy, Sharding):
        return strategy.gradient_norm(policy)
    return nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
