"""Fully sharded data parallelism with Lightning's FSDPStrategy (FSDP1)."""

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
    """The older implementation of sharding, for cases that strategy=fsdp2 does not support.

    The policy itself is the root of the wrapped modules. It cannot be called with its weights gathered. Therefore every rank keeps a
    full copy for sampling, in the precision that the layers compute in, which is updated before each iteration.
    Checkpoints are sharded: a folder with one file per rank.

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
        self._enable_mixed_precision()
        blocks = set(layers(policy))
        settings: dict[str, Any] = {}
        if self.reduced_precision is not None:
            precision = MixedPrecision(param_dtype=self.reduced_precision, reduce_dtype=torch.float32)
            settings["mixed_precision"] = precision
        return FullyShardedDataParallel(
            policy,
            auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in blocks),
            # On a CPU there is nothing to offload, and no memory to pin.
            cpu_offload=CPUOffload(offload_params=self.offload and self.root_device.type != "cpu"),
            device_id=self.root_device,  # Lightning would pass an index, which a CPU does not have
            use_orig_params=True,
            **settings,
        )

    def _enable_mixed_precision(self) -> None:
        """Enable autocast on this strategy's device: Lightning's plugin enables it on CUDA devices, even if the run uses a CPU."""
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(self.precision_plugin.precision))
        if dtype is not None:
            autocast = partial(torch.autocast, self.root_device.type, dtype=dtype)
            vars(self.precision_plugin)["forward_context"] = autocast

    @contextmanager
    def gather_full_parameters(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self._update_copy(policy, self.reduced_precision)

    def full_precision_policy(self, policy: nn.Module) -> nn.Module:
        return self._update_copy(policy)

    def full_state_dict(self, policy: nn.Module) -> tuple[nn.Module, None]:
        # The copy's modules have their unwrapped names, by which peft finds an adapter's weights.
        return self._update_copy(policy), None

    def _update_copy(self, policy: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Copy the current weights, and return the copy. ``dtype`` applies to weights, not to buffers; None: the trained dtype."""
        assert self.copy is not None
        with FullyShardedDataParallel.summon_full_params(policy, writeback=False), torch.no_grad():
            for target, value in zip(self.copy.parameters(), policy.parameters(), strict=True):
                target.data = value.to(dtype or value.dtype, copy=True)
        return self.copy

    def gradient_norm(self, policy: nn.Module) -> Tensor:
        assert isinstance(policy, FullyShardedDataParallel)
        return policy.clip_grad_norm_(torch.inf)  # returns the norm; with an infinite limit nothing is clipped
