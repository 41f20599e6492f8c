"""Errors of ``strategy=fsdp2`` that showed on a GPU, reproduced on a CPU: one process, over gloo."""

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh

from rlmod.model.policy import HFPolicy
from rlmod.strategy.fsdp2 import FSDP2


@pytest.fixture
def strategy(tmp_path):
    dist.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield strategy_with_mesh
    finally:
        dist.destroy_process_group()


def strategy_with_mesh(**settings) -> FSDP2:
    made = FSDP2(**settings)
    made._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    return made


def tiny() -> torch.nn.Module:
    specification = HFPolicy(path="tiny")
    return specification.model(specification.tokenizer())


def test_weights_gathered_in_inference_mode_can_be_trained_with(strategy):
    """On one GPU, PyTorch 2.11 stopped at the first validation: "Inference tensors do not track version counter"."""
    sharding = strategy()
    policy = sharding.shard(tiny())
    with torch.inference_mode(), sharding.gather_full_parameters(policy) as whole:
        assert not any(weight.is_inference() for weight in whole.parameters())
    policy(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert all(weight.grad is not None for weight in policy.parameters())


@pytest.mark.parametrize("offload", [True, False])
def test_offloaded_weights_stay_on_the_cpu_and_everything_else_moves(offload, strategy, monkeypatch):
    """On one GPU: "FSDP parameters should be materialized on CPU when enabling CPU offloading"."""
    sharding = strategy(cpu_offload=offload)
    module = L.LightningModule()
    module.policy, module.other = sharding.shard(tiny()), torch.nn.Linear(2, 2)
    sharding.model = module
    monkeypatch.setattr(FSDP2, "root_device", torch.device("meta"))
    sharding.model_to_device()
    assert {weight.device.type for weight in module.policy.parameters()} == {"cpu" if offload else "meta"}
    assert {buffer.device.type for buffer in module.policy.buffers()} == {"meta"}
    assert {weight.device.type for weight in module.other.parameters()} == {"meta"}
