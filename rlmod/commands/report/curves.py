"""The columns of metrics.csv, and their smoothing."""

import re
from collections.abc import Mapping, Sequence

Curve = Mapping[int, float]
"""Optimizer step -> value, in order of the steps."""
Curves = Mapping[str, Curve]


def window(points: int) -> int:
    """Return the width of the moving average in points: odd, about a sixteenth of the curve; 1 (no smoothing) below 20 points."""
    return 1 if points < 20 else min(51, max(3, points // 16 // 2 * 2 + 1))


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Return the centred moving average. At the ends the window shrinks on both sides, so that it stays centred."""
    averages = []
    for i in range(len(values)):
        reach = min(width // 2, i, len(values) - 1 - i)
        part = values[i - reach : i + reach + 1]
        averages.append(sum(part) / len(part))
    return averages


def smoothing_note(curves: Curves, columns: Sequence[str]) -> str:
    """Return a sentence on the smoothing of the columns; empty if none is smoothed."""
    width = max((window(len(curves[c])) for c in columns if c in curves), default=1)
    return f"thin: every step; bold: centred mean over {width} steps" if width > 1 else ""


def short_name(metric: str) -> str:
    """Return the metric without its group: val/mean@4 -> mean@4."""
    return metric.removeprefix("val/")


def benchmark_means(curves: Curves) -> list[str]:
    """Return the columns of the benchmarks' accuracies, as val/aime24/mean@32."""
    return [name for name in curves if re.fullmatch(r"val/[^/]+/mean@\d+", name)]


def reward_terms(curves: Curves) -> list[str]:
    """Return the columns of the reward's named terms."""
    return [name for name in curves if name.startswith("reward/") and name != "reward/mean"]
