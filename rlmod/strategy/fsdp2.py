"""Fully sharded data parallelism by PyTorch's ``fully_shard`` (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard


class FSDP2(ModelParallelStrategy):
    """Each rank holds a part of every weight, of its gradient and of the optimizer's state; a layer is whole while it computes.

    Source: ZeRO, arXiv:1910.02054, stage 3; PyTorch FSDP, arXiv:2304.11277.
    Degenerate: with one rank it computes what strategy=single computes.
    """

    def __init__(
        self,
        *,
        reduced_precision: Literal["bfloat16", "float16"] | None = None,
        cpu_offload: bool = False,
        sharded_checkpoints: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(save_distributed_checkpoint=sharded_checkpoints, process_group_backend=process_group_backend)
        self.reduced_precision, self.cpu_offload = reduced_precision, cpu_offload

    def setup_environment(self) -> None:
        # Lightning's "auto" means tensor parallelism within a node; here every rank has data of its own.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, policy: nn.Module) -> None:
        """Layer by layer, then what is left; called once."""
        if isinstance(policy, FSDPModule):
            return
        settings: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"]}
        if self.reduced_precision is not None:
            dtype = getattr(torch, self.reduced_precision)
            settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if self.cpu_offload:
            settings["offload_policy"] = CPUOffloadPolicy()
        for layer in layers(policy):
            fully_shard(layer, **settings)
        fully_shard(policy, **settings)


def layers(policy: nn.Module) -> list[nn.Module]:
    """The blocks that transformers says must not be split."""
    names = set(getattr(policy, "_no_split_modules", None) or ())
    return [module for module in policy.modules() if type(module).__name__ in names]


@contextmanager
def whole(policy: nn.Module) -> Iterator[None]:
    """All weights on every rank, so that ranks may ask for different numbers of forward passes, as sampling does."""
    sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not policy, recurse=False)


def whole_state(policy: nn.Module) -> dict[str, torch.Tensor] | None:
    """The weights as rank 0 is to save them, where they are sharded (all ranks call this); None where they are whole anyway."""
    if not any(isinstance(module, FSDPModule) for module in policy.modules()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(policy, options=options))
