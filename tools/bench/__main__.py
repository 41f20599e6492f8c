"""``make bench``: measures what rlmod costs and writes the tables into docs/benchmarks.md, each between its markers.

CPU time of one thread. What is compared takes turns, so that a machine that speeds up or slows down does so for both.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tools.bench import against_trl, components, frame, growth, head, savings, scaling, shaping
from tools.bench.setting import quiet

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def tables(trl: str | None, repetitions: int) -> dict[str, Callable[[], list[str]]]:
    """Return the functions that measure the tables, by the names in the page's markers."""
    return {
        **({} if trl is None else {"trl": lambda: against_trl.table(trl, repetitions)}),
        "frame": lambda: frame.table(repetitions),
        "shaping": lambda: shaping.table(repetitions),
        "savings": lambda: savings.table(repetitions),
        "components": lambda: components.table(repetitions),
        "growth": lambda: growth.table(repetitions),
        "scaling": lambda: scaling.table(repetitions),
        "head": lambda: head.table(repetitions),
    }


def put(page: str, name: str, lines: list[str]) -> str:
    """The page with these lines between the markers of that name. ValueError where it has none."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no {begin} ... {end}")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    options = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--trl", help="the python of an environment with trl==1.16.0; without it nothing is compared with TRL"
    )
    options.add_argument("--repetitions", type=int, default=7)
    options.add_argument("--only", nargs="+", help="the names of the tables to renew; all are renewed without it")
    given = options.parse_args()
    quiet()
    found = tables(given.trl, given.repetitions)
    if unknown := set(given.only or ()) - set(found):
        options.error(f"no such table: {', '.join(sorted(unknown))}; there are {', '.join(found)} (trl with --trl)")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "transformers"))
    names = given.only or list(found)
    if len(names) > 1:  # each in a process of its own: what one has left in memory is no other's
        alone = [sys.executable, "-m", "tools.bench", "--repetitions", str(given.repetitions)]
        for name in names:
            subprocess.run([*alone, *(["--trl", given.trl] if given.trl else []), "--only", name], check=True)
        return
    name, started = names[0], time.perf_counter()
    lines = found[name]()
    print(f"\n## {name}, {time.perf_counter() - started:.0f} s\n\n" + "\n".join(lines), flush=True)
    page = put(PAGE.read_text(), name, lines)
    PAGE.write_text(put(page, "versions", [f"One thread; {versions}."]))


if __name__ == "__main__":
    main()
