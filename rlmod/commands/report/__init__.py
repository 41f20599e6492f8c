"""Report runs as one HTML page that needs no other file: ``rlmod-report RUN [RUN ...]``.

run folder -> RecordedRun (runs) -> pictures (plots, panels) and a page (page, templates): RUN/report.html
several runs, or the folder of a multirun -> curves in common plots (comparison): comparison.html in the first folder
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlmod.commands.report import pictures
from rlmod.commands.report.comparison import comparison_page, run_folders
from rlmod.commands.report.html import write_atomically
from rlmod.commands.report.page import draw_headline, has_headline, run_page
from rlmod.commands.report.runs import RecordedRun, read_run


def write_report(run: Path, compare: Sequence[Path] = ()) -> Path:
    """Write the page of ``run`` and return its path. With ``compare``, or if ``run`` is the folder of a multirun, write the comparison.

    In a comparison, a run that cannot be read is listed with the reason. ValueError if none can be read.
    """
    if not compare and (run / "metrics.csv").is_file():
        return write_atomically(run / "report.html", run_page(read_run(run)))
    runs: list[RecordedRun] = []
    unreadable: list[str] = []
    for folder in (folder for place in (run, *compare) for folder in run_folders(place)):
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            unreadable.append(str(error))
    if not runs:
        raise ValueError("; ".join(unreadable))
    return write_atomically(run / "comparison.html", comparison_page(run, runs, unreadable))


def headline_picture(run: Path) -> Path:
    """Write only the main picture, RUN/report/headline.png, and return its path."""
    loaded = read_run(run)
    if not has_headline(loaded):
        raise ValueError(f"{run} has logged neither reward/mean nor a validation, so it has no main picture")
    path = run / "report" / "headline.png"
    path.parent.mkdir(exist_ok=True)
    pictures.write_picture(draw_headline(loaded), path, pictures.LIGHT)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rlmod-report", description="Write a report of one run, or a comparison of several, as one HTML page."
    )
    parser.add_argument(
        "run",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run or of a multirun; with several, the page is written to the first",
    )
    folders = parser.parse_args(argv).run
    try:
        print(write_report(folders[0], folders[1:]))
    except (ValueError, OSError) as error:
        parser.error(str(error))
