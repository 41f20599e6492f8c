"""Pictures, each drawn for a light and for a dark page and embedded in the page.

Colour-blind readers can tell blue from orange and from red.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlmod.commands.report.curves import Curve, smooth, window

DPI = 200


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a light or dark page."""

    suffix: str
    """Suffix of the file name. Both pictures are in the same folder."""
    surface: str
    ink: str
    faint: str
    blue: str
    orange: str
    grey: str
    series: tuple[str, ...]
    """Colours of the runs in one plot. Further runs reuse them with dashed lines."""


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
    """A picture embedded in the page."""

    name: str
    title: str
    caption: str
    light: str
    dark: str
    """A data: URL, like ``light``, so that the page needs no other file."""


def save_picture(figure: Callable[[Theme], Figure], folder: Path, name: str, title: str, caption: str) -> Picture:
    """Draw the figure in both themes, and write folder/name.png and folder/name-dark.png."""
    folder.mkdir(parents=True, exist_ok=True)
    return Picture(
        name=name,
        title=title,
        caption=caption,
        light=_data_url(write_picture(figure, folder / f"{name}.png", LIGHT)),
        dark=_data_url(write_picture(figure, folder / f"{name}{DARK.suffix}.png", DARK)),
    )


def write_picture(figure: Callable[[Theme], Figure], path: Path, theme: Theme) -> bytes:
    """Draw the figure in one theme, and return the PNG that was written."""
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


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def draw_line(axes: Axes, curve: Curve, color: str, label: str | None = None) -> None:
    """Draw the logged values as a thin line and the smoothed values as a bold line."""
    steps, values = list(curve), list(curve.values())
    width = window(len(values))
    if width > 1:
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.4)
    marker = "o" if len(values) == 1 else ""  # a line through one point is invisible
    axes.plot(steps, smooth(values, width), color=color, linewidth=1.8, label=label, marker=marker, markersize=4)


def draw_points(axes: Axes, curve: Curve, color: str, label: str, **style: Any) -> None:
    """Draw a curve with a marker at each value."""
    style = {"marker": "o", "markersize": 3.5, "linewidth": 1.8} | style
    axes.plot(list(curve), list(curve.values()), color=color, label=label, **style)


def format_step_axis(axes: Axes) -> None:
    """Label the horizontal axis with whole optimizer steps."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]))
