"""Bytes that one rank sends in one rollout batch and its optimizer steps; it receives as many.

With n ranks in a ring, an all-gather and a reduce-scatter of B bytes take B (n - 1) / n each, and an all-reduce is one of each. What else
goes between ranks (statistics over groups, counts, the gradient's norm) is a few numbers a row.
"""

from rlmod.commands.plan.run import Run


def sent(run: Run) -> dict[str, float]:
    """Bytes on the wire by purpose; none with one rank."""
    share = (run.ranks - 1) / run.ranks
    steps = run.minibatches * run.epochs
    found: dict[str, float] = {}
    if run.strategy == "ddp":
        found["all-reduce of gradients"] = 2 * share * steps * run.trained * run.trained_width
    if run.sharded:
        # A layer comes for the forward pass and again for the backward pass; the root stays. Lightning holds back the exchange of
        # gradients until the last micro-batch under DDP alone.
        sweeps = steps * run.micro_batches
        layers = run.shape.layers * run.shape.layer
        found["all-gather of layers"] = share * sweeps * run.gathered * (2 * layers + run.shape.root)
        width = run.trained_width if run.adapter else 4 if run.reduced else run.gathered
        found["reduce-scatter of gradients"] = share * sweeps * run.trained * width
        at_sampling = run.gathered if run.strategy == "fsdp2" else run.weight
        found["gathering to sample"] = share * run.shape.parameters * at_sampling
    return {name: value for name, value in found.items() if value}


def checkpoint(run: Run) -> tuple[float, str]:
    """Bytes of weights and optimizer state in one checkpoint, and who writes them."""
    weights = run.shape.parameters * run.weight + (run.trained * 4 if run.adapter else 0)
    states = run.optimizer_states * run.trained * run.trained_width
    policy = weights if run.adapter is None else run.trained * 4  # in Hugging Face format, beside the trainer's state
    if run.sharded and run.sharded_checkpoints:
        return weights + states + policy, f"1/{run.ranks} by each rank, and policy/ ({policy / 1e9:.1f} GB) by rank 0"
    return weights + states + policy, "by rank 0"
