"""Pages as HTML, without scripts and without other files. jinja2 escapes everything that comes from a run."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlmod.commands.report.curves import short_name


def render_page(page: str, **values: Any) -> str:
    """Return templates/``page``.html filled with the values."""
    environment = Environment(
        loader=PackageLoader("rlmod.commands.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = files("rlmod.commands.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    return environment.get_template(f"{page}.html").render(style=Markup(style), short_name=short_name, **values)


def write_atomically(path: Path, page: str) -> Path:
    """Write the page completely or not at all, and return its path."""
    partial = path.with_name(f".partial-{path.name}")
    # A completion may hold half of a surrogate pair, which UTF-8 cannot encode.
    partial.write_bytes(page.encode("utf-8", errors="replace"))
    return partial.replace(path)


def format_duration(seconds: float) -> str:
    """Return seconds as text: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{whole // 60} min {whole % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
