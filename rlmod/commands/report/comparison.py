"""The page of several runs: final numbers, statistics over seeds, and curves in common plots."""

import re
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlmod.commands.report import plots
from rlmod.commands.report.curves import benchmark_means, short_name, window
from rlmod.commands.report.html import format_duration, render_page
from rlmod.commands.report.pictures import Theme, save_picture
from rlmod.commands.report.runs import RecordedRun, read_run

COMPARED_COLUMNS = (
    ("reward/mean", "Mean training reward"),
    ("completions/entropy", "Entropy (nats per token)"),
    ("completions/length", "Completion length (tokens)"),
)


def run_folders(place: Path) -> list[Path]:
    """Return the folder itself if it is a run, otherwise the runs in it, with run 10 after run 9."""
    if (place / "metrics.csv").is_file():
        return [place]
    inside = [path.parent for path in place.glob("*/metrics.csv")]
    if not inside:
        read_run(place)  # raises, and explains what a run folder is
    return sorted(inside, key=_natural_order)


def _natural_order(path: Path) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", path.name)]


def labels(runs: Sequence[RecordedRun]) -> list[str]:
    """Return a label per run: the overrides that not all runs share, otherwise the folder's name."""
    common = set.intersection(*(set(run.overrides) for run in runs))
    names = [", ".join(o for o in run.overrides if o not in common) or run.folder.resolve().name for run in runs]
    duplicates = {name for name in names if names.count(name) > 1}
    return [f"{n} [{run.folder.resolve().name}]" if n in duplicates else n for n, run in zip(names, runs, strict=True)]


def seed_groups(runs: Sequence[RecordedRun]) -> list[str]:
    """Return the group label of each run. Runs that differ only in the seed form one group."""
    common = set.intersection(*(set(run.overrides) for run in runs))
    kept = [", ".join(o for o in run.overrides if o not in common and not o.startswith("seed=")) for run in runs]
    seeded = [any(o.startswith("seed=") for o in run.overrides) for run in runs]
    return [group if group and seed else name for group, seed, name in zip(kept, seeded, labels(runs), strict=True)]


def comparison_page(folder: Path, runs: Sequence[RecordedRun], unreadable: Sequence[str] = ()) -> str:
    """Draw the pictures into folder/report, and return the page as HTML. ``unreadable`` says which runs are missing, and why."""
    names, group_of = labels(runs), seed_groups(runs)
    groups: dict[str, list[RecordedRun]] = {}
    for run, group in zip(runs, group_of, strict=True):
        groups.setdefault(group, []).append(run)
    metric = next((run.metric for run in runs if run.metric), None)
    pictures = []
    means = dict.fromkeys(name for run in runs for name in benchmark_means(run.curves) if name != metric)
    validated = [name for name in (metric, *means) if name]
    held_out = [(name, f"Held-out {short_name(name)}") for name in validated]
    for column, title in (*held_out, *COMPARED_COLUMNS):
        curves = {g: [run.curves[column] for run in part if column in run.curves] for g, part in groups.items()}
        curves = {group: part for group, part in curves.items() if part}
        if not curves:
            continue
        width = max(window(len(curve)) for part in curves.values() for curve in part)
        smoothed = f"Centred mean over {width} steps." if width > 1 else "As logged."
        is_accuracy = column in validated
        caption = "At every validation." if is_accuracy else smoothed
        draw = partial(_draw_overlaid, curves, is_accuracy)
        file = "comparison-" + column.replace("/", "-").replace("@", "-at-")
        pictures.append(save_picture(draw, folder / "report", file, title, caption))
    rows = [_table_row(folder, run, name, metric) for run, name in zip(runs, names, strict=True)]
    finals = [row["after"] for row in rows if row["after"] is not None]
    return render_page(
        "comparison",
        folder=folder.resolve().name,
        metric=short_name(metric) if metric else None,
        rows=rows,
        best=max(finals) if len(finals) > 1 else None,
        seeds=[_seed_statistics(name, part) for name, part in groups.items()] if len(groups) < len(runs) else [],
        pictures=pictures,
        shared=[o for o in runs[0].overrides if all(o in run.overrides for run in runs)] if len(runs) > 1 else [],
        notes=[
            *(f"unreadable: {reason}" for reason in unreadable),
            *(
                f"{name}: {note}"
                for name, run in zip(names, runs, strict=True)
                for note in run.notes
                if not note.startswith("samples.jsonl")
            ),
        ],
    )


def _draw_overlaid(curves: Mapping[str, Sequence[Mapping[int, float]]], is_accuracy: bool, theme: Theme) -> Any:
    return plots.draw_overlay(curves, is_accuracy=is_accuracy, points=is_accuracy, theme=theme)


def _table_row(folder: Path, run: RecordedRun, name: str, metric: str | None) -> dict[str, Any]:
    page = run.folder / "report.html"
    near = page.is_file() and page.resolve().is_relative_to(folder.resolve())
    curve = run.curves.get(metric or "", {})
    return {
        "name": name,
        "metric": short_name(run.metric) if run.metric not in (None, metric) else None,
        "page": page.resolve().relative_to(folder.resolve()).as_posix() if near else None,
        "before": run.before,
        "after": run.after,
        "validated_at": run.validated_at,
        "gain": None if run.before is None or run.after is None else run.after - run.before,
        "best": max(curve.values()) if curve else None,
        "steps": run.steps,
        "time": None if run.seconds is None else format_duration(run.seconds),
        "seed": run.seed,
        "completed": run.completed,
    }


def _seed_statistics(name: str, runs: Sequence[RecordedRun]) -> dict[str, Any]:
    finals = [run.after for run in runs if run.after is not None]
    if not finals:
        return {"name": name, "runs": 0, "mean": None, "low": None, "high": None}
    return {
        "name": name,
        "runs": len(finals),
        "mean": statistics.fmean(finals),
        "low": min(finals),
        "high": max(finals),
    }
