"""Fully sharded data parallelism with PyTorch's ``fully_shard`` (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlmod.model.shared_prompts import layers


class FSDP2(ModelParallelStrategy):
    """Each rank holds a shard of every weight, of its gradient and of its optimizer state. A layer is gathered while it computes.

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
        if cpu_offload and torch.cuda.is_available():  # offloaded tensors are also reduced on the CPU
            process_group_backend = process_group_backend or "cpu:gloo,cuda:nccl"
        super().__init__(save_distributed_checkpoint=sharded_checkpoints, process_group_backend=process_group_backend)
        self.reduced_precision, self.cpu_offload = reduced_precision, cpu_offload

    def setup_environment(self) -> None:
        # Lightning's "auto" means tensor parallelism within a node. Here all ranks are data-parallel.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def model_to_device(self) -> None:
        """Move everything to the rank's device, except offloaded weights, which ``fully_shard`` requires on the CPU."""
        assert self.model is not None
        for child in self.model.children():
            if self.cpu_offload and any(isinstance(module, FSDPModule) for module in child.modules()):
                for module in child.modules():
                    for name, buffer in module.named_buffers(recurse=False):
                        setattr(module, name, buffer.to(self.root_device))
            else:
                child.to(self.root_device)

    def shard(self, policy: nn.Module) -> nn.Module:
        if isinstance(policy, FSDPModule):
            return policy
        settings: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"]}
        if self.reduced_precision is not None:
            dtype = getattr(torch, self.reduced_precision)
            settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if self.cpu_offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        for layer in layers(policy):
            fully_shard(layer, **settings)
        fully_shard(policy, **settings)
        return policy

    @contextmanager
    def gather_full_parameters(self, policy: nn.Module) -> Iterator[nn.Module]:
        # The first forward pass would make its module the root, and sampling does not call the policy's outermost module (an adapter).
        cast(Any, policy)._get_fsdp_state()._lazy_init()
        sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
        # Lightning validates in inference mode. A tensor gathered in it could not be used for training later.
        with torch.inference_mode(False), torch.no_grad():
            for module in sharded:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        try:
            yield policy
        finally:
            for module in sharded:
                module.reshard()
                module.set_reshard_after_forward(module is not policy, recurse=False)

    def full_precision_policy(self, policy: nn.Module) -> nn.Module:
        return policy

    def full_state_dict(self, policy: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return policy, cast(dict[str, Tensor], get_model_state_dict(policy, options=options))

    def gradient_norm(self, policy: nn.Module) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(self.root_device)
