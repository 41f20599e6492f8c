"""The plan as text. docs/scaling.md quotes it."""

from dataclasses import replace

from rlmod.commands.plan import activations, advice, duration, memory, traffic
from rlmod.commands.plan.run import Run


def format_plan(run: Run) -> str:
    """Return the plan: memory by part and phase, the verdict, bytes over the network, and seconds by stage."""
    return "\n\n".join((_title(run), _memory(run), _verdict(run), _traffic(run), _times(run)))


def _title(run: Run) -> str:
    s = run.shape
    number = f"{s.parameters / 1e9:.2f} B" if s.parameters >= 1e8 else f"{s.parameters / 1e6:.2f} M"
    size = f"{number} weights, {s.layers} layers, hidden {s.hidden}, vocabulary {s.vocabulary}"
    trained = "" if run.adapter is None else f"; an adapter of {run.trained_parameters / 1e6:.1f} M is trained"
    precision = f"weights in {8 * run.weight_width} bit, matrix products in {8 * run.compute_width} bit"
    rows = (
        f"{run.on_policy_rows} completions per rollout batch on each rank, up to {run.prompt} + {run.completion} tokens; "
        f"{run.step_rows} per step in {run.micro_batches} micro-batches of {run.rows}"
    )
    return f"{size}{trained}\n{run.strategy} on {run.ranks} x {run.hardware.name}; {precision}\n{rows}"


def _memory(run: Run) -> str:
    phases = memory.phases(run)
    lines = [[f"{_unit(run)[0]} per rank", *(phase.name for phase in phases)]]
    for part in memory.PARTS:
        if any(phase.parts.get(part) for phase in phases):
            lines.append([part, *(_size(run, phase.parts[part]) if part in phase.parts else "-" for phase in phases)])
    lines.append(["total", *(_size(run, phase.total) for phase in phases)])
    table = _align(lines)
    return f"{table}\nactivations of a micro-batch {_compare_checkpointing(run)}"


def _compare_checkpointing(run: Run) -> str:
    without, with_ = (activations.saved_bytes(replace(run, checkpointing=on)) for on in (False, True))
    return f"without checkpointing {_size(run, without)} {_unit(run)[0]}, with it {_size(run, with_)} {_unit(run)[0]}"


def _verdict(run: Run) -> str:
    worst, hardware = memory.peak(run), run.hardware
    largest = max(worst.parts, key=lambda part: worst.parts[part])
    available = hardware.memory_gib - hardware.reserve_gib
    size = (
        f"{_size(run, worst.total)} {_unit(run)[0]} of {available:.1f} GiB ({hardware.memory_gib} less {hardware.reserve_gib} reserved), "
        f"in {worst.name}; "
        f"the largest part is {largest}"
    )
    if memory.fits(run):
        return f"fits: {size}"
    changes = advice.cheapest_changes(run)
    suggestion = (
        f"the cheapest change that makes it fit: {' '.join(changes)}"
        if changes
        else "no change of sizes, checkpointing or sharding is enough: use more ranks, an adapter, or a smaller policy"
    )
    return f"does not fit: {size}\n{suggestion}"


def _traffic(run: Run) -> str:
    sent = traffic.bytes_sent(run)
    size, writers = traffic.checkpoint_bytes(run)
    lines = [["GB sent per rank, one rollout batch and its steps", ""]]
    lines += [[name, f"{value / 1e9:.1f}"] for name, value in sent.items()]
    if not sent:
        lines.append(["nothing: one rank", "0.0"])
    return f"{_align(lines)}\na checkpoint: {size / 1e9:.1f} GB, written {writers}"


def _times(run: Run) -> str:
    stages = duration.stages(run)
    total = sum(stage.seconds for stage in stages)
    lines = [["seconds, one rollout batch and its steps", "", "limited by"]]
    lines += [[stage.name, f"{stage.seconds:.1f}", stage.bound] for stage in stages]
    lines.append(["total, without overlap", f"{total:.1f}", ""])
    tokens = run.ranks * run.on_policy_rows * run.draws * run.mean_completion
    h = run.hardware
    return (
        f"{_align(lines)}\n{tokens / total:.0f} sampled tokens per second over all ranks, for completions of {run.mean_completion:.0f} "
        f"tokens and {run.draws:g} draws per prompt\nassumed: {h.mfu:.0%} of the peak rate, {h.bandwidth_share:.0%} of the bandwidths, "
        f"{h.layer_ms} ms per layer and token with sampler=hf"
    )


def _unit(run: Run) -> tuple[str, int]:
    return ("GiB", 2**30) if memory.peak(run).total >= 2**30 else ("MiB", 2**20)


def _size(run: Run, number: float) -> str:
    return f"{number / _unit(run)[1]:.2f}"


def _align(lines: list[list[str]]) -> str:
    """Align the lines as a table: the first column and trailing words to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = []
    for line in lines:
        cells = [
            cell.ljust(width) if i == 0 or not lines[-1][i][:1].isdigit() else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)
