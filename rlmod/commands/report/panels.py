"""The small pictures of a run's page. Each is drawn only if one of its columns was logged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlmod.commands.report.curves import Curve, Curves, benchmark_means, reward_terms, short_name, smooth, window
from rlmod.commands.report.pictures import Theme, draw_line, draw_points


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A small picture: its title, a hint, its columns, and the function that draws it."""

    name: str
    title: str
    hint: str
    """Caption that says what to look for."""
    columns: tuple[str, ...]
    draw: Callable[[Figure, Curves, Theme], None]


def draw_panel(panel: Panel, curves: Curves, theme: Theme) -> Figure:
    """Draw a panel with its step axis."""
    figure = Figure(figsize=(3.7, 2.7))
    panel.draw(figure, curves, theme)
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
        axes.margins(x=0.02)
    figure.axes[-1].set_xlabel("optimizer step")
    return figure


def logged_panels(curves: Curves) -> list[Panel]:
    """Return the panels of which a column was logged, in the order of the page."""
    terms = reward_terms(curves)
    every = PANELS if len(terms) < 2 else (*PANELS, _terms_panel(terms))
    failures = [name for name in curves if name.startswith("failures/") and any(curves[name].values())]
    if failures:
        every = (*every, _failures_panel(failures))
    if means := benchmark_means(curves):
        every = (_benchmarks_panel(means), *every)
    return [panel for panel in every if any(column in curves for column in panel.columns)]


def _stacked_axes(
    figure: Figure, curves: Curves, groups: Sequence[tuple[str, ...]], ratios: Sequence[int]
) -> list[Axes | None]:
    """Return one plot per group of columns, one above the other, or None if a group was not logged. Units never share an axis."""
    present = [any(column in curves for column in group) for group in groups]
    heights = [ratio for ratio, here in zip(ratios, present, strict=True) if here]
    drawn = iter(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    return [next(drawn) if here else None for here in present]


def _format_share(axes: Axes, curve: Curve, least: float) -> None:
    """Show a share from 0 to at least ``least``, so that noise near 0 is not magnified."""
    axes.set_ylim(0, max(least, 1.12 * max(curve.values())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))


def _draw_entropy(figure: Figure, curves: Curves, theme: Theme) -> None:
    axes = figure.add_subplot()
    axes.set_title("nats per token")
    draw_line(axes, curves["completions/entropy"], theme.blue)
    axes.set_ylim(bottom=0)


def _draw_length(figure: Figure, curves: Curves, theme: Theme) -> None:
    length, truncated = _stacked_axes(figure, curves, (("completions/length",), ("completions/truncated",)), (3, 2))
    if length is not None:
        length.set_title("mean tokens")
        draw_line(length, curves["completions/length"], theme.blue)
        length.set_ylim(bottom=0)
    if truncated is not None:
        truncated.set_title("share truncated")
        draw_line(truncated, curves["completions/truncated"], theme.orange)
        _format_share(truncated, curves["completions/truncated"], 0.05)


SHARES = ("prompts/all_correct", "prompts/mixed", "prompts/all_incorrect")


def _draw_prompts(figure: Figure, curves: Curves, theme: Theme) -> None:
    axes = figure.add_subplot()
    names = [name for name in SHARES if name in curves]
    if names:
        # Areas are stacked at the steps that all columns have, and are always smoothed: thin raw areas would hide one another.
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


def _draw_ratio(figure: Figure, curves: Curves, theme: Theme) -> None:
    ratio, clipped = _stacked_axes(figure, curves, (("train/ratio",), ("train/clip_fraction",)), (1, 1))
    if ratio is not None:
        ratio.set_title("mean ratio to the sampling policy")
        draw_line(ratio, curves["train/ratio"], theme.blue)
        reach = max(0.0125, 1.12 * max(abs(value - 1) for value in curves["train/ratio"].values()))
        ratio.set_ylim(1 - reach, 1 + reach)
        ratio.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    if clipped is not None:
        clipped.set_title("share of tokens clipped")
        draw_line(clipped, curves["train/clip_fraction"], theme.orange)
        _format_share(clipped, curves["train/clip_fraction"], 0.01)


def _draw_gradient(figure: Figure, curves: Curves, theme: Theme) -> None:
    axes = figure.add_subplot()
    norm = curves["train/grad_norm"]
    draw_line(axes, norm, theme.blue)
    ordered = sorted(norm.values())
    if ordered[0] > 0 and ordered[-1] > 20 * ordered[len(ordered) // 2]:
        axes.set_yscale("log")  # one spike would flatten the rest
        axes.set_title("log scale")
    else:
        axes.set_ylim(bottom=0)


def _draw_speed(figure: Figure, curves: Curves, theme: Theme) -> None:
    speed, time = _stacked_axes(figure, curves, (("speed/tokens_per_second",), ("time/collect", "time/train")), (1, 1))
    if speed is not None:
        speed.set_title("tokens per second")
        draw_line(speed, curves["speed/tokens_per_second"], theme.blue)
        speed.set_ylim(bottom=0)
        speed.yaxis.set_major_locator(MaxNLocator(nbins=3))
    if time is not None:
        times = {name: curves[f"time/{name}"] for name in ("collect", "train") if f"time/{name}" in curves}
        time.set_title("seconds per step")
        steps = [step for step in next(iter(times.values())) if all(step in curve for curve in times.values())]
        values = [smooth([curve[step] for step in steps], window(len(steps))) for curve in times.values()]
        colors = {"collect": theme.blue, "train": theme.orange}
        style = {"colors": [colors[name] for name in times], "edgecolor": theme.surface, "linewidth": 0.8}
        time.stackplot(steps, *values, labels=list(times), **style)
        place = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.96), "borderpad": 0}
        time.legend(ncols=2, fontsize=8, handlelength=1.0, columnspacing=0.9, handletextpad=0.4, **place)
        time.set_ylim(bottom=0)
        time.yaxis.set_major_locator(MaxNLocator(nbins=3))


def _benchmarks_panel(means: Sequence[str]) -> Panel:
    def draw(figure: Figure, curves: Curves, theme: Theme) -> None:
        axes = figure.add_subplot()
        for i, name in enumerate(means):
            draw_points(axes, curves[name], theme.series[i % len(theme.series)], f" {short_name(name)}")
        axes.set_ylim(-0.02, 1.02)
        figure.legend(loc="outside upper left", ncols=2, fontsize=8, handlelength=1.0, columnspacing=0.9)

    hint = "Share of correct completions on each set, at every validation."
    return Panel(name="benchmarks", title="Benchmarks", hint=hint, columns=tuple(means), draw=draw)


def _terms_panel(terms: Sequence[str]) -> Panel:
    def draw(figure: Figure, curves: Curves, theme: Theme) -> None:
        axes = figure.add_subplot()
        for i, name in enumerate(terms):
            draw_line(axes, curves[name], theme.series[i % len(theme.series)], " " + name.removeprefix("reward/"))
        figure.legend(loc="outside upper left", ncols=2, fontsize=8, handlelength=1.0, columnspacing=0.9)

    hint = "Their sum is the reward. An easy term must not grow at the cost of correct answers."
    return Panel(name="terms", title="Reward terms", hint=hint, columns=tuple(terms), draw=draw)


def _failures_panel(names: Sequence[str]) -> Panel:
    def draw(figure: Figure, curves: Curves, theme: Theme) -> None:
        axes = figure.add_subplot()
        axes.set_title("completions per iteration")
        for i, name in enumerate(names):
            draw_line(axes, curves[name], theme.series[i % len(theme.series)], " " + name.removeprefix("failures/"))
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=2, fontsize=8, handlelength=1.0, columnspacing=0.9)

    hint = "Completions on which the reward failed, and those that it left out."
    return Panel(name="failures", title="Failed rewards", hint=hint, columns=tuple(names), draw=draw)


PANELS = (
    Panel(
        name="entropy",
        title="Entropy",
        hint="Near 0 the policy has stopped exploring (collapse).",
        columns=("completions/entropy",),
        draw=_draw_entropy,
    ),
    Panel(
        name="length",
        title="Completion length",
        hint="If both rise together, completions grow until the token limit (runaway).",
        columns=("completions/length", "completions/truncated"),
        draw=_draw_length,
    ),
    Panel(
        name="prompts",
        title="Prompts by their completions",
        hint="Only mixed groups compare correct with incorrect completions.",
        columns=(*SHARES, "prompts/dropped"),
        draw=_draw_prompts,
    ),
    Panel(
        name="ratio",
        title="Ratio and clipping",
        hint="One update on fresh samples keeps the ratio at 1 and clips nothing.",
        columns=("train/ratio", "train/clip_fraction"),
        draw=_draw_ratio,
    ),
    Panel(
        name="gradient",
        title="Gradient norm",
        hint="Spikes before a drop in reward suggest a learning rate that is too high.",
        columns=("train/grad_norm",),
        draw=_draw_gradient,
    ),
    Panel(
        name="speed",
        title="Speed",
        hint="Sampling speed, and the time of each stage.",
        columns=("speed/tokens_per_second", "time/collect", "time/train"),
        draw=_draw_speed,
    ),
)
