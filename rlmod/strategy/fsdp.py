"""Fully sharded data parallelism by Lightning's FSDPStrategy."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from rlmod.model.shared_prompts import layers


class FSDP(FSDPStrategy):
    """The older implementation of sharding, for what strategy=fsdp2 cannot do.

    The policy itself is the root of what is wrapped. It cannot be called with its weights gathered, so that sampling has a copy of it
    on every rank, in the precision that the layers compute in, brought up to date before each iteration.
    Checkpoints are sharded: a folder with a file a rank.

    Source: PyTorch FSDP, arXiv:2304.11277.
    Degenerate: with one rank it computes what strategy=single computes.
    """

    def __init__(
        self,
        *,
        reduced_precision: Literal["bfloat16", "float16"] | None = None,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(state_dict_type="sharded", process_group_backend=process_group_backend)
        self.reduced_precision, self.offload = reduced_precision and getattr(torch, reduced_precision), cpu_offload
        self.copy: nn.Module | None = None

    def shard(self, policy: nn.Module) -> nn.Module:
        if isinstance(policy, FullyShardedDataParallel):
            return policy
        self.copy = copy.deepcopy(policy).requires_grad_(False).eval().to(self.root_device)
        self._mix_precision_here()
        blocks = set(layers(policy))
        settings: dict[str, Any] = {}
        if self.reduced_precision is not None:
            precision = MixedPrecision(param_dtype=self.reduced_precision, reduce_dtype=torch.float32)
            settings["mixed_precision"] = precision
        return FullyShardedDataParallel(
            policy,
            auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in blocks),
            # On a CPU everything is there already, and there is nothing to pin its memory for.
            cpu_offload=CPUOffload(offload_params=self.offload and self.root_device.type != "cpu"),
            device_id=self.root_device,  # Lightning would pass an index, which a CPU does not have
            use_orig_params=True,
            **settings,
        )

    def _mix_precision_here(self) -> None:
        """Lightning's plugin asks for mixed precision on CUDA devices, whatever the device is."""
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(self.precision_plugin.precision))
        if mixed is not None:
            here = partial(torch.autocast, self.root_device.type, dtype=mixed)
            vars(self.precision_plugin)["forward_context"] = here

    @contextmanager
    def gather_full_parameters(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self._copied(policy, self.reduced_precision)

    def full_precision_policy(self, policy: nn.Module) -> nn.Module:
        return self._copied(policy)

    def full_state_dict(self, policy: nn.Module) -> tuple[nn.Module, None]:
        # Its modules have their plain names, by which peft finds an adapter's weights.
        return self._copied(policy), None

    def _copied(self, policy: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """``dtype``: of the copy's weights, but not of its buffers; None: as they are trained."""
        assert self.copy is not None
        with FullyShardedDataParallel.summon_full_params(policy, writeback=False), torch.no_grad():
            for mine, value in zip(self.copy.parameters(), policy.parameters(), strict=True):
                mine.data = value.to(dtype or value.dtype, copy=True)
        return self.copy

    def gradient_norm(self, policy: nn.Module) -> Tensor:
        assert isinstance(policy, FullyShardedDataParallel)
        return policy.clip_grad_norm_(torch.inf)  # the norm, and nothing is clipped
