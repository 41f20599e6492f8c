"""The cheapest change with which a run would fit."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

from rlmod.commands.plan import duration, memory
from rlmod.commands.plan.run import Run

Ways = dict[str, list[tuple[str, Run]]]
"""Return possible changes by name: the override and the run with it; each half of a size that can be halved."""


def cheapest(run: Run) -> list[str] | None:
    """Overrides with which the run fits: the fewest, and of as few those that take the least time. None where none are enough."""
    for number in range(1, 6):
        found = [_taken(run, chosen) for chosen in combinations(ways(run), number)]
        fitting = [(overrides, changed) for overrides, changed in found if memory.fits(changed)]
        if fitting:
            return min(fitting, key=lambda change: sum(stage.seconds for stage in duration.stages(change[1])))[0]
    return None


def _taken(run: Run, chosen: tuple[str, ...]) -> tuple[list[str], Run]:
    """Return the run after the chosen changes, one after the other; a size is halved until the phases of that name fit."""
    overrides: list[str] = []
    for name in chosen:
        steps = ways(run).get(name, [])
        if steps:
            override, run = next((step for step in steps if memory.fits(step[1], name)), steps[-1])
            overrides.append(override)
    return overrides, run


def ways(run: Run) -> Ways:
    """The sizes come last, since the phase that they are of has to fit with all else."""
    found: Ways = {}
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
    return {name: steps for name, steps in (found | _sizes(run)).items() if steps}


def _sizes(run: Run) -> Ways:
    sampling, entries_per_chunk = run.sampling, min(run.sampling.rows_at_once or run.own_rows, run.own_rows)
    if sampling.engine:
        shares = [share for share in (0.7, 0.5, 0.3) if share < sampling.share]
        engine = [(share, replace(run, sampling=replace(sampling, share=share))) for share in shares]
        found: Ways = {"engine": [(f"sampler.gpu_memory_utilization={share}", changed) for share, changed in engine]}
    else:
        found = {
            "validation": [
                (f"+validation.sampler.rows_per_batch={rows}", replace(run, validation_rows=rows))
                for rows in _halves(run.validation_rows)
            ],
            "sampling": [
                (f"sampler.rows_per_batch={rows}", replace(run, sampling=replace(sampling, rows_at_once=rows)))
                for rows in _halves(entries_per_chunk)
            ],
        }
    found["training"] = [
        (f"batch.micro_batch={rows}", replace(run, micro_batch=rows))
        for rows in _halves(run.rows)
        if not run.step_rows % rows
    ]
    return found


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number
