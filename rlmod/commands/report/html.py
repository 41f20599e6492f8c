"""The pages as HTML: no scripts, no files beside them; jinja2 escapes whatever a run put in."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlmod.commands.report.curves import short


def rendered(page: str, **values: Any) -> str:
    """templates/``page``.html, filled in."""
    environment = Environment(
        loader=PackageLoader("rlmod.commands.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = files("rlmod.commands.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    return environment.get_template(f"{page}.html").render(style=Markup(style), short=short, **values)


def written(path: Path, page: str) -> Path:
    """Whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    # A completion may hold half of a surrogate pair, which has no UTF-8.
    partial.write_bytes(page.encode("utf-8", errors="replace"))
    return partial.replace(path)


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{whole // 60} min {whole % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
