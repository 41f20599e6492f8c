"""Seconds of one rollout batch and its optimizer steps, by stage, from the rates of the machine. An estimate: rates are assumed."""

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
    """The resource that it waits for."""


def stages(run: Run) -> list[Stage]:
    """In the order of an iteration, each as if nothing overlapped."""
    found = [_sampling(run)]
    if run.guide is not None and run.guide.rows:
        found.append(Stage("guide", *_decoding(run, run.guide, run.guide_rows, run.guide.rows)))
    if memory.scores(run):
        found.append(Stage("scoring", _scored(run) / _rate(run), f"products at {run.hardware.mfu:.0%} of the peak"))
    work = run.epochs * run.collected_rows * training_flops(run)
    found.append(Stage("training", work / _rate(run), f"products at {run.hardware.mfu:.0%} of the peak"))
    if sent := sum(traffic.sent(run).values()):
        inside = run.ranks <= run.hardware.devices_per_node
        link = f"links {'within' if inside else 'between'} nodes"
        found.append(Stage("sync", sent / run.hardware.link(run.ranks), link))
    return found


def forward_flops(shape: Shape, prompt: float, completion: float) -> float:
    """FLOPs of one row: two per weight and token, attention over all pairs, logits of the completion."""
    length = prompt + completion
    attention = 4 * shape.layers * shape.queries * length**2
    return 2 * shape.layers * shape.layer_products * length + attention + 2 * shape.embedding * completion


def training_flops(run: Run) -> float:
    """FLOPs of one row: backward is twice forward (once, for inputs alone, with an adapter); the head runs forward twice, and
    with checkpointing so are the layers."""
    forward = forward_flops(run.shape, run.mean_prompt, run.mean_completion)
    head = 2 * run.shape.embedding * run.mean_completion
    layers = forward - head
    backward = 1 if run.adapter else 2
    return layers * (1 + backward + run.checkpointing) + head * (2 + backward)


def model_flops(run: Run) -> float:
    """FLOPs of one row, as MFU counts them: three forward passes, whatever is recomputed."""
    return 3 * forward_flops(run.shape, run.mean_prompt, run.mean_completion)


def _rate(run: Run) -> float:
    return run.hardware.flops(run.compute) * run.hardware.mfu


def _sampling(run: Run) -> Stage:
    rows = math.ceil(run.own_rows * run.draws)
    if not run.sampling.engine:
        return Stage("sampling", *_decoding(run, run, rows, run.sampling.rows_at_once or run.own_rows))
    room = max(run.sampling.share * run.hardware.memory_gib * 2**30 - run.shape.parameters * 2, 0)
    a_row = (run.mean_prompt + run.mean_completion) * run.shape.layers * run.shape.keys * 2 * 2
    entries_per_chunk = max(min(int(room / a_row), rows), 1) if run.sampling.share else rows
    return Stage("sampling", *_decoding(run, run, rows, entries_per_chunk))


def _decoding(run: Run, model: Run | Model, rows: int, entries_per_chunk: int) -> tuple[float, str]:
    """Token by token, for each the slowest of: reading weights and keys, multiplying, and launching a layer's kernels."""
    shape = model.shape
    width = run.compute if isinstance(model, Run) else model.width
    batches = math.ceil(rows / entries_per_chunk)
    prefill = rows * forward_flops(shape, run.mean_prompt, 1) / _rate(run)
    steps = batches * run.mean_completion
    average = run.mean_prompt + run.mean_completion / 2
    read = shape.parameters * width + min(rows, entries_per_chunk) * average * shape.layers * shape.keys * 2 * width
    waits = {
        "memory bandwidth": read / (1e9 * run.hardware.memory_gb_per_s * run.hardware.bandwidth_share),
        "products": 2 * shape.parameters * min(rows, entries_per_chunk) / _rate(run),
        "launching kernels": 0 if run.sampling.engine and model is run else shape.layers * run.hardware.layer_ms / 1e3,
    }
    slowest = max(waits, key=lambda name: waits[name])
    return prefill + steps * waits[slowest], slowest


def _scored(run: Run) -> float:
    """Forward FLOPs of the rows that need one pass or two: the guide's, an engine's, and all for a reference."""
    by_policy = run.guide_rows + (run.own_rows * run.draws if run.sampling.engine else 0)
    work = by_policy * forward_flops(run.shape, run.mean_prompt, run.mean_completion)
    if run.reference is not None:
        work += run.collected_rows * forward_flops(run.reference.shape, run.mean_prompt, run.mean_completion)
    return work
