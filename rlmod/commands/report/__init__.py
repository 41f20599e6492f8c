"""``rlmod-report RUN [RUN ...]``: what a run did, on one HTML page that needs no other file.

run folder -> Run (runs) -> pictures (plots, panels) and a page (page, templates): RUN/report.html
several runs, or the folder of a multirun -> laid over each other (comparison): comparison.html in the first-named folder
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlmod.commands.report import pictures
from rlmod.commands.report.comparison import comparison_page, run_folders
from rlmod.commands.report.html import written
from rlmod.commands.report.page import has_headline, headline, run_page
from rlmod.commands.report.runs import read_run


def write_report(run: Path, compare: Sequence[Path] = ()) -> Path:
    """The page of ``run``; with ``compare``, or where ``run`` is the folder of a multirun, the comparison."""
    if not compare and (run / "metrics.csv").is_file():
        return written(run / "report.html", run_page(read_run(run)))
    runs = [read_run(folder) for given in (run, *compare) for folder in run_folders(given)]
    return written(run / "comparison.html", comparison_page(run, runs))


def headline_picture(run: Path) -> Path:
    """Writes the main picture alone, RUN/report/headline.png."""
    read = read_run(run)
    if not has_headline(read):
        raise ValueError(f"{run} has logged neither reward/mean nor a validation: there is no headline to draw")
    path = run / "report" / "headline.png"
    path.parent.mkdir(exist_ok=True)
    pictures.write(headline(read), path, pictures.LIGHT)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rlmod-report", description="Writes what a run did, or how runs compare, as one page."
    )
    parser.add_argument(
        "run",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder, or the folder of a multirun; of several, the first one gets the page",
    )
    given = parser.parse_args(argv).run
    try:
        print(write_report(given[0], given[1:]))
    except ValueError as error:
        parser.error(str(error))
