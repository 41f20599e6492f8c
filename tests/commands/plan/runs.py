"""A run whose numbers can be worked out by hand."""

from rlmod.commands.plan.hardware import Hardware
from rlmod.commands.plan.run import Run, Sampling
from rlmod.commands.plan.shape import Shape

SHAPE = Shape(layers=2, hidden=8, intermediate=16, heads=4, kv_heads=2, head_dim=2, vocabulary=100, tied=False)
"""A layer: q, o 8 x 8 each, k, v 8 x 4 each, three of 8 x 16, two norms of 8: 64 + 64 + 32 + 32 + 384 + 16 = 592 weights. Embedding
and head 800 each, the last norm 8. In all 2 * 592 + 1608 = 2792."""

MACHINE = Hardware(
    name="toy",
    memory_gib=1.0,
    reserve_gib=0.5,
    bf16_tflops=2e-6,
    fp32_tflops=1e-6,
    memory_gb_per_s=1e-3,
    link_gb_per_s=1e-6,
    network_gb_per_s=1e-7,
    devices_per_node=4,
    mfu=0.5,
    bandwidth_share=0.5,
    layer_ms=0.0,
)

RUN = Run(
    shape=SHAPE,
    weight_width=4,
    autocast=False,
    attention="sdpa",
    checkpointing=False,
    adapter=None,
    strategy="single",
    ranks=1,
    reduced=False,
    offload=False,
    sharded_checkpoints=False,
    optimizer_states=2,
    prompt=4,
    completion=6,
    mean_prompt=4,
    mean_completion=6,
    draws=1.0,
    prompts=2,
    on_policy_rows=8,
    guide_rows=0,
    rollout_rows=8,
    validation_rows=0,
    minibatches=1,
    epochs=1,
    micro_batch=4,
    micro_batch_tokens=None,
    entropy=False,
    sampling=Sampling(),
    guide=None,
    reference=None,
    hardware=MACHINE,
)
