"""What a strategy that shards the policy offers besides Lightning's part."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Sharding(Protocol):
    def shard(self, policy: nn.Module) -> nn.Module:
        """The policy with its weights shared out among the ranks; one that is already comes back as it is."""
        ...

    def whole(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """The policy with all its weights on every rank, so that ranks may take different numbers of forward passes."""
        ...

    def whole_state(self, policy: nn.Module) -> dict[str, Tensor]:
        """All weights, for rank 0 to save; every rank calls this."""
        ...

    def gradient_norm(self, policy: nn.Module) -> Tensor:
        """Of the whole gradient."""
        ...


@contextmanager
def whole(strategy: object, policy: nn.Module) -> Iterator[nn.Module]:
    if isinstance(strategy, Sharding):
        with strategy.whole(policy) as unsharded:
            yield unsharded
    else:
        yield policy


def check_readable(strategy: object, checkpoint: Path) -> None:
    """ValueError for a checkpoint with a file a rank where the strategy has no shares to read them into."""
    if checkpoint.is_dir() and not isinstance(strategy, Sharding):
        raise ValueError(
            f"resume: {checkpoint} is sharded (a file a rank), which strategy=single and ddp cannot read: go on with the strategy that "
            f"wrote it, trainer.devices=1 will do; or begin a run with its weights alone, policy.path={checkpoint.parent / 'policy'}"
        )


def layers(policy: nn.Module) -> list[nn.Module]:
    """The blocks that transformers says must not be split."""
    names = set(getattr(policy, "_no_split_modules", None) or ())
    return [module for module in policy.modules() if type(module).__name__ in names]
