"""Bytes that one rank sends in one rollout batch and its optimizer steps. It receives as many.

In a ring of n ranks, an all-gather and a reduce-scatter of B bytes send B (n - 1) / n each, and an all-reduce is one of each. Other
traffic between ranks (statistics over groups, counts, the gradient's norm) is a few numbers per row.
"""

from rlmod.commands.plan.run import Run


def bytes_sent(run: Run) -> dict[str, float]:
    """Return the bytes sent by purpose; empty with one rank."""
    share = (run.ranks - 1) / run.ranks
    steps = run.minibatches * run.epochs
    found: dict[str, float] = {}
    if run.strategy == "ddp":
        found["all-reduce of gradients"] = 2 * share * steps * run.trained_parameters * run.trained_width
    if run.sharded:
        # Layers are gathered for the forward pass and again for the backward pass; weights outside layers stay gathered. Lightning
        # delays the reduction of gradients until the last micro-batch only with DDP.
        sweeps = steps * run.micro_batches
        layers = run.shape.layers * run.shape.layer
        found["all-gather of layers"] = share * sweeps * run.gathered_width * (2 * layers + run.shape.root)
        width = run.trained_width if run.adapter else 4 if run.reduced else run.gathered_width
        found["reduce-scatter of gradients"] = share * sweeps * run.trained_parameters * width
        at_sampling = run.gathered_width if run.strategy == "fsdp2" else run.weight_width
        found["gathering to sample"] = share * run.shape.parameters * at_sampling
    return {name: value for name, value in found.items() if value}


def checkpoint_bytes(run: Run) -> tuple[float, str]:
    """Return the bytes of weights and optimizer state in one checkpoint, and a phrase that says which ranks write them."""
    weights = run.shape.parameters * run.weight_width + (run.trained_parameters * 4 if run.adapter else 0)
    states = run.optimizer_states * run.trained_parameters * run.trained_width
    policy = (
        weights if run.adapter is None else run.trained_parameters * 4
    )  # in Hugging Face format, next to the trainer's state
    if run.sharded and run.sharded_checkpoints:
        return weights + states + policy, f"1/{run.ranks} by each rank, and policy/ ({policy / 1e9:.1f} GB) by rank 0"
    return weights + states + policy, "by rank 0"
