"""Search for the cheapest changes that make a run fit."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

from rlmod.commands.plan import duration, memory
from rlmod.commands.plan.run import Run

Changes = dict[str, list[tuple[str, Run]]]
"""Possible changes by name, each a list of (override, changed run). A size has one entry per halving."""


def cheapest_changes(run: Run) -> list[str] | None:
    """Return the fewest overrides that make the run fit, and among equally few the fastest; None if none are enough."""
    for number in range(1, 6):
        found = [_apply_changes(run, chosen) for chosen in combinations(possible_changes(run), number)]
        fitting = [(overrides, changed) for overrides, changed in found if memory.fits(changed)]
        if fitting:
            return min(fitting, key=lambda change: sum(stage.seconds for stage in duration.stages(change[1])))[0]
    return None


def _apply_changes(run: Run, chosen: tuple[str, ...]) -> tuple[list[str], Run]:
    """Apply the chosen changes in order, and return the overrides and the run. A size is halved until the phase of that name fits."""
    overrides: list[str] = []
    for name in chosen:
        steps = possible_changes(run).get(name, [])
        if steps:
            override, run = next((step for step in steps if memory.fits(step[1], name)), steps[-1])
            overrides.append(override)
    return overrides, run


def possible_changes(run: Run) -> Changes:
    """List the changes that apply to the run. Sizes come last, because their phase must fit with all other changes."""
    found: Changes = {}
    if run.sharded and not run.reduced:
        found["reduced"] = [("trainer.strategy.reduced_precision=bfloat16", replace(run, reduced=True))]
    if not run.checkpointing:
        found["checkpointing"] = [("policy.gradient_checkpointing=true", replace(run, checkpointing=True))]
    if run.strategy == "fsdp":
        found["fsdp2"] = [("strategy=fsdp2", replace(run, strategy="fsdp2"))]
    if not run.sharded and run.ranks > 1:
        changed = replace(run, strategy="fsdp2", reduced=True)
        found["fsdp2"] = [("strategy=fsdp2 trainer.strategy.reduced_precision=bfloat16", changed)]
    if run.sharded and not run.offload:
        found["offload"] = [("trainer.strategy.cpu_offload=true", replace(run, offload=True))]
    return {name: steps for name, steps in (found | _smaller_sizes(run)).items() if steps}


def _smaller_sizes(run: Run) -> Changes:
    sampling = run.sampling
    batch_rows = min(sampling.rows_per_batch or run.on_policy_rows, run.on_policy_rows)
    if sampling.engine:
        shares = [share for share in (0.7, 0.5, 0.3) if share < sampling.share]
        engine = [(share, replace(run, sampling=replace(sampling, share=share))) for share in shares]
        found: Changes = {"engine": [(f"sampler.gpu_memory_utilization={share}", changed) for share, changed in engine]}
    else:
        found = {
            "validation": [
                (f"+validation.sampler.rows_per_batch={rows}", replace(run, validation_rows=rows))
                for rows in _halves(run.validation_rows)
            ],
            "sampling": [
                (f"sampler.rows_per_batch={rows}", replace(run, sampling=replace(sampling, rows_per_batch=rows)))
                for rows in _halves(batch_rows)
            ],
        }
    found["training"] = [
        (f"batch.micro_batch={rows}", replace(run, micro_batch=rows))
        for rows in _halves(run.rows)
        if not run.step_rows % rows
    ]
    return found


def _halves(number: int) -> Iterator[int]:
    """Yield the number halved once, twice, and so on, down to 1."""
    while number > 1:
        number //= 2
        yield number
