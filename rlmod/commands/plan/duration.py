"""Estimated seconds of one rollout batch and its optimizer steps, by stage. The rates of the machine are assumed, not measured."""

import math
from dataclasses import dataclass

from rlmod.commands.plan import memory, traffic
from rlmod.commands.plan.run import Model, Run
from rlmod.commands.plan.shape import Shape


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    bound: str
    """The resource that limits its speed."""


def stages(run: Run) -> list[Stage]:
    """Return the stages in the order of an iteration. Their times assume that no stages overlap."""
    found = [_sampling_stage(run)]
    if run.guide is not None and run.guide.rows:
        found.append(Stage("guide", *_decoding_time(run, run.guide, run.guide_rows, run.guide.rows)))
    if memory.needs_logprob_pass(run):
        found.append(
            Stage(
                "log-prob pass",
                _logprob_flops(run) / _achieved_flops(run),
                f"matrix products at {run.hardware.mfu:.0%} of the peak",
            )
        )
    flops = run.epochs * run.rollout_rows * training_flops(run)
    found.append(
        Stage("training", flops / _achieved_flops(run), f"matrix products at {run.hardware.mfu:.0%} of the peak")
    )
    if sent := sum(traffic.bytes_sent(run).values()):
        inside = run.ranks <= run.hardware.devices_per_node
        link = f"links {'within' if inside else 'between'} nodes"
        found.append(Stage("sync", sent / run.hardware.link_bytes_per_second(run.ranks), link))
    return found


def forward_flops(shape: Shape, prompt: float, completion: float) -> float:
    """Return the FLOPs of one row: two per weight and token, attention over all pairs, logits of the completion."""
    length = prompt + completion
    attention = 4 * shape.layers * shape.queries * length**2
    return 2 * shape.layers * shape.layer_products * length + attention + 2 * shape.embedding * completion


def training_flops(run: Run) -> float:
    """Return the FLOPs of one row.

    The backward pass costs twice the forward pass, or once with an adapter, which needs gradients of inputs only. The head runs forward
    twice. With checkpointing the layers run forward twice as well.
    """
    forward = forward_flops(run.shape, run.mean_prompt, run.mean_completion)
    head = 2 * run.shape.embedding * run.mean_completion
    layers = forward - head
    backward = 1 if run.adapter else 2
    return layers * (1 + backward + run.checkpointing) + head * (2 + backward)


def model_flops(run: Run) -> float:
    """Return the FLOPs of one row as MFU counts them: three forward passes, without recomputation."""
    return 3 * forward_flops(run.shape, run.mean_prompt, run.mean_completion)


def _achieved_flops(run: Run) -> float:
    """Return the assumed FLOPs per second of forward and backward passes."""
    return run.hardware.peak_flops(run.compute_width) * run.hardware.mfu


def _sampling_stage(run: Run) -> Stage:
    rows = math.ceil(run.on_policy_rows * run.draws)
    if not run.sampling.engine:
        return Stage("sampling", *_decoding_time(run, run, rows, run.sampling.rows_per_batch or run.on_policy_rows))
    cache = max(run.sampling.share * run.hardware.memory_gib * 2**30 - run.shape.parameters * 2, 0)
    per_row = (run.mean_prompt + run.mean_completion) * run.shape.layers * run.shape.keys * 2 * 2
    batch_rows = max(min(int(cache / per_row), rows), 1) if run.sampling.share else rows
    return Stage("sampling", *_decoding_time(run, run, rows, batch_rows))


def _decoding_time(run: Run, model: Run | Model, rows: int, batch_rows: int) -> tuple[float, str]:
    """Return the seconds of decoding and the limiting resource.

    Each token takes the longest of three times: reading weights and keys, matrix products, and launching the kernels of the layers.
    """
    shape = model.shape
    width = run.compute_width if isinstance(model, Run) else model.width
    batches = math.ceil(rows / batch_rows)
    prefill = rows * forward_flops(shape, run.mean_prompt, 1) / _achieved_flops(run)
    steps = batches * run.mean_completion
    average = run.mean_prompt + run.mean_completion / 2
    read = shape.parameters * width + min(rows, batch_rows) * average * shape.layers * shape.keys * 2 * width
    times = {
        "memory bandwidth": read / (1e9 * run.hardware.memory_gb_per_s * run.hardware.bandwidth_share),
        "matrix products": 2 * shape.parameters * min(rows, batch_rows) / _achieved_flops(run),
        "launching kernels": 0 if run.sampling.engine and model is run else shape.layers * run.hardware.layer_ms / 1e3,
    }
    slowest = max(times, key=lambda name: times[name])
    return prefill + steps * times[slowest], slowest


def _logprob_flops(run: Run) -> float:
    """Return the FLOPs of passes without gradients: the policy's for rows of guide or engine, the reference's for all rows."""
    by_policy = run.guide_rows + (run.on_policy_rows * run.draws if run.sampling.engine else 0)
    flops = by_policy * forward_flops(run.shape, run.mean_prompt, run.mean_completion)
    if run.reference is not None:
        flops += run.rollout_rows * forward_flops(run.reference.shape, run.mean_prompt, run.mean_completion)
    return flops
