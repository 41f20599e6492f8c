"""The main picture of a run, and the curves of several runs in one plot."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rlmod.commands.report.curves import Curve, Curves, short_name, smooth, window
from rlmod.commands.report.pictures import Theme, draw_line, draw_points, format_step_axis


def draw_headline(curves: Curves, metric: str | None, extra: Sequence[str], title: str, theme: Theme) -> Figure:
    """Draw held-out accuracy (``metric``, and ``extra`` metrics with thinner lines) and mean training reward over the optimizer steps."""
    figure = Figure(figsize=(8.6, 3.9))
    axes = figure.add_subplot()
    if "reward/mean" in curves:
        draw_line(axes, curves["reward/mean"], theme.orange, "mean training reward")
    for name, dashes in zip(extra, ((4, 2), (1, 1.5), (6, 2, 1, 2)), strict=False):
        draw_points(
            axes, curves[name], theme.blue, f"held-out {short_name(name)}", linewidth=1.2, alpha=0.75, dashes=dashes
        )
    if metric is not None:
        held_out = curves[metric]
        draw_points(
            axes, held_out, theme.blue, f"held-out {short_name(metric)}", linewidth=2.2, markersize=5.5, zorder=4
        )
        first, last = min(held_out), max(held_out)
        for step in sorted({first, last}):
            # Keep clear of the curve: below its start if it rises, and below its end if that is near the top of the axis.
            above = held_out[last] <= held_out[first] if step == first else held_out[step] < 0.9
            axes.annotate(
                f"{held_out[step]:.2f}",
                (step, held_out[step]),
                xytext=(0, 9 if above else -9),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                color=theme.blue,
                fontsize=11,
                fontweight="bold",
                zorder=5,
            )
    drawn = [v for name in ("reward/mean", metric or "", *extra) if name in curves for v in curves[name].values()]
    # Accuracies lie in 0 to 1. A reward may leave this range (penalty, several terms); the axis then covers all values.
    axes.set_ylim(min([0.0, *drawn]) - 0.02, max([1.0, *drawn]) + 0.02)
    axes.set_title(title, fontsize=12, fontweight="bold", pad=10)
    format_step_axis(axes)
    axes.margins(x=0.03)
    axes.legend(loc="best", fontsize=10)
    return figure


def draw_overlay(groups: Mapping[str, Sequence[Curve]], *, is_accuracy: bool, points: bool, theme: Theme) -> Figure:
    """Draw the curves of several runs. Runs of a group (they differ only in the seed) share a colour and a legend entry."""
    # The leading space keeps labels that begin with an underscore, which matplotlib omits. The page's table has the full label.
    labels = [" " + (label if len(label) <= 60 else label[:59] + "…") for label in groups]
    columns = 1 if max(map(len, labels)) > 26 else 2
    figure = Figure(figsize=(5.4, 3.3 + 0.2 * -(-len(groups) // columns)))
    axes = figure.add_subplot()
    handles = []
    for i, curves in enumerate(groups.values()):
        color, dashes = theme.series[i % len(theme.series)], i // len(theme.series)
        style: dict[str, Any] = {"color": color, "linestyle": ("-", "--", ":")[dashes % 3]}
        for n, curve in enumerate(curves):
            steps, values = list(curve), list(curve.values())
            marker = "o" if points or len(values) == 1 else ""
            values = values if points else smooth(values, window(len(values)))
            handle = axes.plot(steps, values, linewidth=1.7, alpha=0.9, marker=marker, markersize=3.5, **style)[0]
            if n == 0:
                handles.append(handle)
    if is_accuracy:
        axes.set_ylim(-0.02, 1.02)
    format_step_axis(axes)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=9, handlelength=1.5)
    return figure
