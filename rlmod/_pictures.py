"""The pictures of a report: each drawn twice, for a light and for a dark page.

    curves (column of metrics.csv -> step -> value) -> a matplotlib Figure -> PNG files and what embeds them in the page

Colours: colour-blind readers tell blue from orange (and from red) too. Nothing here knows of run folders.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Curve = Mapping[int, float]
"""Optimizer step -> value, in order of the steps."""
Curves = Mapping[str, Curve]
DPI = 200


@dataclass(frozen=True, kw_only=True)
class Theme:
    suffix: str
    """Of the file name: the dark picture stands beside the light one."""
    surface: str
    ink: str
    faint: str
    blue: str
    orange: str
    grey: str
    series: tuple[str, ...]
    """For runs laid over each other; a colour returns dashed once all are used."""


LIGHT = Theme(
    suffix="",
    surface="#ffffff",
    ink="#1d2430",
    faint="#6b7480",
    blue="#1f6fc4",
    orange="#d1651a",
    grey="#c3c9d1",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5f66"),
)
DARK = Theme(
    suffix="-dark",
    surface="#1a1e25",
    ink="#e4e8ee",
    faint="#98a2af",
    blue="#5ba6f2",
    orange="#f2995a",
    grey="#565f6c",
    series=("#4aa8ea", "#f0803c", "#2fc298", "#dd93ba", "#efb43a", "#8fd0f5", "#a9afb8"),
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as the page embeds it."""

    name: str
    title: str
    caption: str
    light: str
    dark: str
    """data: addresses, so that the page needs no file beside it."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of the small pictures: drawn only where one of its columns was logged."""

    name: str
    title: str
    hint: str
    """What to look for in it."""
    columns: tuple[str, ...]
    draw: Callable[[Figure, Curves, Theme], None]


def saved(figure: Callable[[Theme], Figure], folder: Path, name: str, title: str, caption: str) -> Picture:
    """Draws in both themes, writes folder/name.png and folder/name-dark.png."""
    folder.mkdir(parents=True, exist_ok=True)
    return Picture(
        name=name,
        title=title,
        caption=caption,
        light=_address(write(figure, folder / f"{name}.png", LIGHT)),
        dark=_address(write(figure, folder / f"{name}{DARK.suffix}.png", DARK)),
    )


def write(figure: Callable[[Theme], Figure], path: Path, theme: Theme) -> bytes:
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.edgecolor": theme.grey,
        "axes.labelcolor": theme.faint,
        "axes.facecolor": theme.surface,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": theme.grey,
        "grid.alpha": 0.45,
        "grid.linewidth": 0.6,
        "xtick.color": theme.grey,
        "ytick.color": theme.grey,
        "xtick.labelcolor": theme.faint,
        "ytick.labelcolor": theme.faint,
        "text.color": theme.ink,
        "text.parse_math": False,  # a label may hold a dollar sign
        "figure.facecolor": theme.surface,
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
        "lines.solid_capstyle": "round",
    }
    with rc_context(style):
        buffer = io.BytesIO()
        figure(theme).savefig(buffer, format="png", dpi=DPI)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def _address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


# Smoothing -----------------------------------------------------------------------------------------------------------


def window(points: int) -> int:
    """Of the moving average, in points: odd, about a sixteenth of the curve; 1 (no smoothing) below 20 points."""
    return 1 if points < 20 else min(51, max(3, points // 16 // 2 * 2 + 1))


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The centred moving average. At the ends the window shrinks on both sides, so that it stays centred."""
    averages = []
    for i in range(len(values)):
        reach = min(width // 2, i, len(values) - 1 - i)
        part = values[i - reach : i + reach + 1]
        averages.append(sum(part) / len(part))
    return averages


def smoothing_note(curves: Curves, columns: Sequence[str]) -> str:
    width = max((window(len(curves[c])) for c in columns if c in curves), default=1)
    return f"thin: every step; bold: centred mean over {width} steps" if width > 1 else ""


def _line(axes: Axes, curve: Curve, color: str, label: str | None = None) -> None:
    """Thin as logged, bold smoothed."""
    steps, values = list(curve), list(curve.values())
    width = window(len(values))
    if width > 1:
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.4)
    marker = "o" if len(values) == 1 else ""  # a line of one point shows nothing
    axes.plot(steps, smooth(values, width), color=color, linewidth=1.8, label=label, marker=marker, markersize=4)


# The main picture ----------------------------------------------------------------------------------------------------


def headline(curves: Curves, metric: str | None, extra: Sequence[str], title: str, theme: Theme) -> Figure:
    """Held-out accuracy (``metric``, and ``extra`` ones thinner) and mean training reward over the optimizer steps."""
    figure = Figure(figsize=(8.6, 3.9))
    axes = figure.add_subplot()
    if "reward/mean" in curves:
        _line(axes, curves["reward/mean"], theme.orange, "mean training reward")
    for name, dashes in zip(extra, ((4, 2), (1, 1.5), (6, 2, 1, 2)), strict=False):
        _points(axes, curves[name], theme.blue, f"held-out {short(name)}", linewidth=1.2, alpha=0.75, dashes=dashes)
    if metric is not None:
        held_out = curves[metric]
        _points(axes, held_out, theme.blue, f"held-out {short(metric)}", linewidth=2.2, markersize=5.5, zorder=4)
        first, last = min(held_out), max(held_out)
        for step in sorted({first, last}):
            # Out of the way of the curve: below its start where it rises, below its end where the axis ends above.
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
    # Accuracies need 0 to 1; a reward may leave it (a penalty, several terms), and is shown whole then.
    axes.set_ylim(min([0.0, *drawn]) - 0.02, max([1.0, *drawn]) + 0.02)
    axes.set_title(title, fontsize=12, fontweight="bold", pad=10)
    _steps(axes)
    axes.margins(x=0.03)
    axes.legend(loc="best", fontsize=10)
    return figure


def _points(axes: Axes, curve: Curve, color: str, label: str, **style: Any) -> None:
    style = {"marker": "o", "markersize": 3.5, "linewidth": 1.8} | style
    axes.plot(list(curve), list(curve.values()), color=color, label=label, **style)


def short(metric: str) -> str:
    """val/mean@4 -> mean@4."""
    return metric.removeprefix("val/")


def _steps(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]))


# The small pictures --------------------------------------------------------------------------------------------------


def small(panel: Panel, curves: Curves, theme: Theme) -> Figure:
    figure = Figure(figsize=(3.7, 2.7))
    panel.draw(figure, curves, theme)
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
        axes.margins(x=0.02)
    figure.axes[-1].set_xlabel("optimizer step")
    return figure


def panels(curves: Curves) -> list[Panel]:
    """Those of which something was logged, in the order of the page."""
    terms = reward_terms(curves)
    every = PANELS if len(terms) < 2 else (*PANELS, _terms_panel(terms))
    return [panel for panel in every if any(column in curves for column in panel.columns)]


def reward_terms(curves: Curves) -> list[str]:
    return [name for name in curves if name.startswith("reward/") and name != "reward/mean"]


def _rows(
    figure: Figure, curves: Curves, groups: Sequence[tuple[str, ...]], ratios: Sequence[int]
) -> list[Axes | None]:
    """One plot above the other, for the groups of columns that were logged: two units never share one axis."""
    present = [any(column in curves for column in group) for group in groups]
    heights = [ratio for ratio, here in zip(ratios, present, strict=True) if here]
    drawn = iter(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    return [next(drawn) if here else None for here in present]


def _share(axes: Axes, curve: Curve, least: float) -> None:
    """A share from 0 up, at least to ``least``: noise around 0 is not blown up."""
    axes.set_ylim(0, max(least, 1.12 * max(curve.values())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))


def _entropy(figure: Figure, curves: Curves, theme: Theme) -> None:
    axes = figure.add_subplot()
    axes.set_title("nats a token")
    _line(axes, curves["completions/entropy"], theme.blue)
    axes.set_ylim(bottom=0)


def _length(figure: Figure, curves: Curves, theme: Theme) -> None:
    length, truncated = _rows(figure, curves, (("completions/length",), ("completions/truncated",)), (3, 2))
    if length is not None:
        length.set_title("mean tokens")
        _line(length, curves["completions/length"], theme.blue)
        length.set_ylim(bottom=0)
    if truncated is not None:
        truncated.set_title("share truncated")
        _line(truncated, curves["completions/truncated"], theme.orange)
        _share(truncated, curves["completions/truncated"], 0.05)


SHARES = ("prompts/all_right", "prompts/mixed", "prompts/all_wrong")


def _prompts(figure: Figure, curves: Curves, theme: Theme) -> None:
    axes = figure.add_subplot()
    names = [name for name in SHARES if name in curves]
    if names:
        # Areas can only be stacked where all were logged; smoothed alike, since thin raw areas would hide one another.
        steps = [step for step in curves[names[0]] if all(step in curves[name] for name in names)]
        values = [smooth([curves[name][step] for step in steps], window(len(steps))) for name in names]
        colors: dict[str, str] = dict(zip(SHARES, (theme.blue, theme.grey, theme.orange), strict=True))
        axes.stackplot(
            steps,
            *values,
            labels=[name.removeprefix("prompts/").replace("_", " ") for name in names],
            colors=[colors[name] for name in names],
            edgecolor=theme.surface,
            linewidth=0.8,
        )
    if dropped := curves.get("prompts/dropped"):
        smoothed = smooth(list(dropped.values()), window(len(dropped)))
        axes.plot(list(dropped), smoothed, color=theme.ink, linewidth=1.2, dashes=(3, 2), label="dropped")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(False)
    figure.legend(loc="outside upper left", ncols=4, fontsize=8, handlelength=1.0, columnspacing=0.9, handletextpad=0.4)


def _ratio(figure: Figure, curves: Curves, theme: Theme) -> None:
    ratio, clipped = _rows(figure, curves, (("train/ratio",), ("train/clip_fraction",)), (1, 1))
    if ratio is not None:
        ratio.set_title("mean ratio to the sampling policy")
        _line(ratio, curves["train/ratio"], theme.blue)
        reach = max(0.0125, 1.12 * max(abs(value - 1) for value in curves["train/ratio"].values()))
        ratio.set_ylim(1 - reach, 1 + reach)
        ratio.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    if clipped is not None:
        clipped.set_title("share of tokens clipped")
        _line(clipped, curves["train/clip_fraction"], theme.orange)
        _share(clipped, curves["train/clip_fraction"], 0.01)


def _gradient(figure: Figure, curves: Curves, theme: Theme) -> None:
    axes = figure.add_subplot()
    norm = curves["train/grad_norm"]
    _line(axes, norm, theme.blue)
    ordered = sorted(norm.values())
    if ordered[0] > 0 and ordered[-1] > 20 * ordered[len(ordered) // 2]:
        axes.set_yscale("log")  # one spike would press the rest flat
        axes.set_title("log scale")
    else:
        axes.set_ylim(bottom=0)


def _speed(figure: Figure, curves: Curves, theme: Theme) -> None:
    speed, time = _rows(figure, curves, (("speed/tokens_per_second",), ("time/collect", "time/train")), (1, 1))
    if speed is not None:
        speed.set_title("tokens a second")
        _line(speed, curves["speed/tokens_per_second"], theme.blue)
        speed.set_ylim(bottom=0)
        speed.yaxis.set_major_locator(MaxNLocator(nbins=3))
    if time is not None:
        parts = {name: curves[f"time/{name}"] for name in ("collect", "train") if f"time/{name}" in curves}
        time.set_title("seconds a step")
        steps = [step for step in next(iter(parts.values())) if all(step in curve for curve in parts.values())]
        values = [smooth([curve[step] for step in steps], window(len(steps))) for curve in parts.values()]
        colors = {"collect": theme.blue, "train": theme.orange}
        style = {"colors": [colors[name] for name in parts], "edgecolor": theme.surface, "linewidth": 0.8}
        time.stackplot(steps, *values, labels=list(parts), **style)
        place = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.96), "borderpad": 0}
        time.legend(ncols=2, fontsize=8, handlelength=1.0, columnspacing=0.9, handletextpad=0.4, **place)
        time.set_ylim(bottom=0)
        time.yaxis.set_major_locator(MaxNLocator(nbins=3))


def _terms_panel(terms: Sequence[str]) -> Panel:
    def draw(figure: Figure, curves: Curves, theme: Theme) -> None:
        axes = figure.add_subplot()
        for i, name in enumerate(terms):
            _line(axes, curves[name], theme.series[i % len(theme.series)], " " + name.removeprefix("reward/"))
        figure.legend(loc="outside upper left", ncols=2, fontsize=8, handlelength=1.0, columnspacing=0.9)

    hint = "Their sum is the reward: see that a cheap one does not grow at the cost of the right answer."
    return Panel(name="terms", title="Reward terms", hint=hint, columns=tuple(terms), draw=draw)


PANELS = (
    Panel(
        name="entropy",
        title="Entropy",
        hint="Near 0 the policy has stopped exploring (collapse).",
        columns=("completions/entropy",),
        draw=_entropy,
    ),
    Panel(
        name="length",
        title="Completion length",
        hint="Both rising together: completions run away to the token limit.",
        columns=("completions/length", "completions/truncated"),
        draw=_length,
    ),
    Panel(
        name="prompts",
        title="Prompts by their completions",
        hint="Only mixed groups compare right with wrong.",
        columns=(*SHARES, "prompts/dropped"),
        draw=_prompts,
    ),
    Panel(
        name="ratio",
        title="Ratio and clipping",
        hint="One update on fresh samples keeps the ratio at 1 and clips nothing.",
        columns=("train/ratio", "train/clip_fraction"),
        draw=_ratio,
    ),
    Panel(
        name="gradient",
        title="Gradient norm",
        hint="Spikes before a fall in reward point at the learning rate.",
        columns=("train/grad_norm",),
        draw=_gradient,
    ),
    Panel(
        name="speed",
        title="Speed",
        hint="Where a step spends its time.",
        columns=("speed/tokens_per_second", "time/collect", "time/train"),
        draw=_speed,
    ),
)


# Runs laid over each other -------------------------------------------------------------------------------------------


def overlaid(groups: Mapping[str, Sequence[Curve]], *, is_accuracy: bool, points: bool, theme: Theme) -> Figure:
    """The runs of a group (the same but for the seed) share a colour and one line of the legend."""
    # The leading space: matplotlib leaves out a label that begins with an underscore. The page's table has it whole.
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
    _steps(axes)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=9, handlelength=1.5)
    return figure
