"""``rlmod-report RUN [RUN ...]``: what a run did, on one HTML page that needs no other file.

    run folder -> Run (whatever of it is there) -> pictures and a page: RUN/report.html
    several runs, or the folder of a multirun  -> laid over each other: comparison.html in the first-named folder

A run folder holds metrics.csv, and, where the run got that far, config.yaml, samples.jsonl and result.json. Only
metrics.csv is required: a run that was killed is reported too, and the page says what is missing.
"""

import argparse
import csv
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from rlmod import _pictures
from rlmod._pictures import Curves

RIGHT = 0.5
"""A sample is marked right when its reward is above this, as in the shapers."""
MOST_PAIRS = 60
SHOWN_PAIRS = 6
"""Of the before-and-after samples; the others fold away."""
DEEPEST = 75
"""Per cent of colour at the largest advantage: the text stays readable on it."""
MOST_TOKENS = 500
"""Of one sample in the view by token: a page of 100,000 coloured spans cannot be scrolled."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A line of samples.jsonl. The tuples are empty where the line had no values by token."""

    step: int
    when: str
    prompt: str
    answer: str
    completion: str
    reward: float
    truncated: bool = False
    length: int | None = None
    tokens: tuple[str, ...] = ()
    entropy: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()

    @property
    def right(self) -> bool:
        return self.reward > RIGHT


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, read. What is missing is empty, and ``notes`` say so."""

    folder: Path
    curves: Curves
    result: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    overrides: tuple[str, ...] = ()
    """As given on the command line."""
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def held_out(self) -> list[str]:
        """The columns of the validation, mean@K before pass@K and small K first."""
        order = {"mean": 0, "pass": 1}
        names = [name for name in self.curves if re.fullmatch(r"val/(mean|pass)@\d+", name)]
        return sorted(names, key=lambda name: (order[name[4:8]], int(name.split("@")[1])))

    @property
    def metric(self) -> str | None:
        """The column of the headline: the one that result.json names, else the first."""
        named = _mapping(self.result, "held_out").get("metric")
        return named if isinstance(named, str) and named in self.curves else next(iter(self.held_out), None)

    @property
    def before(self) -> float | None:
        return self._accuracy("before")

    @property
    def after(self) -> float | None:
        return self._accuracy("after")

    def _accuracy(self, when: str) -> float | None:
        """result.json has it; of a killed run the validations in metrics.csv do, if there were two."""
        held_out = _mapping(self.result, "held_out")
        if _is_number(held_out.get(when)) and self.metric in (None, held_out.get("metric", self.metric)):
            return float(held_out[when])
        curve = self.curves[self.metric] if self.metric else {}
        if when == "before":
            return curve.get(0)
        return curve[max(curve)] if curve and max(curve) > 0 else None

    @property
    def problems(self) -> int | None:
        value = _mapping(self.result, "held_out").get("problems")
        return int(value) if _is_number(value) else None

    @property
    def steps(self) -> int:
        logged = max((max(curve) for curve in self.curves.values()), default=0)
        steps = self.result.get("steps")
        return int(steps) if _is_number(steps) else logged

    @property
    def seconds(self) -> float | None:
        """Of training."""
        value = _mapping(self.result, "seconds").get("training")
        return float(value) if _is_number(value) else None

    @property
    def seed(self) -> object:
        return self.result.get("seed", self.config.get("seed"))

    @property
    def completed(self) -> bool:
        return self.result.get("completed") is True


# Reading a run folder ------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    if not (folder / "metrics.csv").is_file():
        raise ValueError(
            f"{folder} is not a run folder: it has no metrics.csv. A run folder is what rlmod-train writes: "
            "metrics.csv, config.yaml, samples.jsonl and result.json; a Hydra multirun's folder holds several of them"
        )
    notes: list[str] = []
    curves = _read_curves(folder / "metrics.csv", notes)
    config_text = _read_text(folder / "config.yaml", "the composition is not known", notes)
    samples = _read_samples(folder / "samples.jsonl", notes)
    result = _read_result(folder / "result.json", notes)
    return Run(
        folder=folder,
        curves=curves,
        result=result,
        config=_parsed_yaml(config_text, notes),
        config_text=config_text,
        overrides=_read_overrides(folder / ".hydra" / "overrides.yaml"),
        samples=samples,
        notes=tuple(notes),
    )


def _read_curves(path: Path, notes: list[str]) -> Curves:
    """A cell is empty where its metric was not logged at that step; a resumed run's later row replaces the earlier."""
    curves: dict[str, dict[int, float]] = {}
    unreadable = 0
    strange: dict[str, list[int]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(line.replace("\0", "") for line in file):
            step = _number(row.pop("step", None))
            row.pop("epoch", None)
            if step is None or not math.isfinite(step):
                unreadable += 1
                continue
            for name, cell in row.items():
                value = _number(cell)
                if value is None:
                    unreadable += bool(cell)
                elif not math.isfinite(value):
                    strange.setdefault(name, []).append(int(step))
                else:
                    curves.setdefault(name, {})[int(step)] = value
    if not curves:
        notes.append("metrics.csv holds no values yet: there is nothing to draw.")
    if unreadable:
        notes.append(
            f"metrics.csv: {unreadable} {_plural(unreadable, 'cell or row', 'cells or rows')} could not be read."
        )
    for name, steps in strange.items():
        times = f"{len(steps)} {_plural(len(steps), 'value', 'values')}"
        notes.append(f"{name}: {times} not finite (NaN or infinite), the first at step {steps[0]}; not drawn.")
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _read_samples(path: Path, notes: list[str]) -> tuple[Sample, ...]:
    if not path.is_file():
        notes.append("samples.jsonl is missing: no samples to show.")
        return ()
    samples, broken = [], 0
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            try:
                samples.append(_sample(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                broken += 1
    if broken:
        lines = _plural(broken, "line is", "lines are")
        notes.append(
            f"samples.jsonl: {broken} {lines} broken and left out (a run killed while it writes leaves half a line)."
        )
    return tuple(samples)


def _sample(record: Mapping[str, Any]) -> Sample:
    if not isinstance(record, dict) or not isinstance(record["completion"], str):
        raise TypeError("a sample is a mapping with a completion")
    tokens, entropy, advantages = (record.get(name) or () for name in ("tokens", "entropy", "advantages"))
    by_token = bool(tokens) and len(tokens) == len(entropy) == len(advantages)
    return Sample(
        step=int(record["step"]),
        when=str(record["when"]),
        prompt=str(record["prompt"]),
        answer=str(record.get("answer", "")),
        completion=record["completion"],
        reward=float(record["reward"]),
        truncated=bool(record.get("truncated", False)),
        length=int(record["length"]) if _is_number(record.get("length")) else None,
        tokens=tuple(map(str, tokens)) if by_token else (),
        entropy=tuple(map(_finite, entropy)) if by_token else (),
        advantages=tuple(map(_finite, advantages)) if by_token else (),
    )


def _read_overrides(path: Path) -> tuple[str, ...]:
    try:
        overrides = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ()  # a run that was not started on the command line has none
    return tuple(map(str, overrides)) if isinstance(overrides, list) else ()


def _read_text(path: Path, consequence: str, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append(f"{path.name} is missing: {consequence}.")
        return ""


def _read_result(path: Path, notes: list[str]) -> Mapping[str, Any]:
    consequence = "the run was stopped before its end, and the numbers are the last that metrics.csv has"
    text = _read_text(path, consequence, notes)
    if not text:
        return {}
    try:
        result = json.loads(text)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        notes.append(f"{path.name} is broken: {consequence}.")
        return {}
    if result.get("completed") is not True:
        notes.append("The run did not complete (result.json): the last numbers are those of where it stopped.")
    return result


def _parsed_yaml(text: str, notes: list[str]) -> Mapping[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        notes.append("config.yaml is broken: the composition is not known.")
        return {}
    return value if isinstance(value, dict) else {}


def _number(cell: object) -> float | None:
    try:
        return float(cell) if isinstance(cell, str) and cell.strip() else None
    except ValueError:
        return None


def _finite(value: object) -> float:
    return float(value) if _is_number(value) else 0.0


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


# What was composed ---------------------------------------------------------------------------------------------------


def composition(run: Run) -> dict[str, str]:
    """Stage -> name, as it is called on the command line. A stage that the config does not have is left out."""
    named = {stage: _name(run.config.get(stage)) for stage in ("policy", "shaper", "loss", "weighting")}
    terms = [term.removeprefix("reward/") for term in _pictures.reward_terms(run.curves)]
    named["reward"] = " + ".join(terms or sorted(set(_targets(run.config.get("reward")))))
    return {stage: name for stage, name in named.items() if name}


def _name(component: object) -> str:
    """Of a policy its path or hub name, else its class in snake_case, which is its key on the command line."""
    if isinstance(component, str):
        return component
    if not isinstance(component, dict):
        return ""
    for key in ("path", "name", "model", "pretrained_model_name_or_path"):
        if isinstance(component.get(key), str):
            path = component[key]
            return Path(path).name if path.startswith(("/", ".", "~")) else path
    return next(iter(_targets(component)), "")


def _targets(component: object) -> list[str]:
    """The components in it; one that holds others (a weighted sum) is named by them."""
    if not isinstance(component, dict):
        return []
    values = [item for value in component.values() for item in (value if isinstance(value, list) else [value])]
    inner = [target for value in values for target in _targets(value)]
    if inner or not isinstance(component.get("_target_"), str):
        return inner
    return [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", component["_target_"].rsplit(".", 1)[-1]).lower()]


# The page of one run -------------------------------------------------------------------------------------------------


def write_report(run: Path, compare: Sequence[Path] = ()) -> Path:
    """The page of ``run``; with ``compare``, or where ``run`` is the folder of a multirun, the comparison."""
    if not compare and (run / "metrics.csv").is_file():
        return _write(run / "report.html", _run_page(read_run(run)))
    runs = [read_run(folder) for given in (run, *compare) for folder in _run_folders(given)]
    return _write(run / "comparison.html", _comparison_page(run, runs))


def headline_picture(run: Path) -> Path:
    """Writes the main picture alone, RUN/report/headline.png."""
    read = read_run(run)
    if not _has_headline(read):
        raise ValueError(f"{run} has logged neither reward/mean nor a validation: there is no headline to draw")
    path = run / "report" / "headline.png"
    path.parent.mkdir(exist_ok=True)
    _pictures.write(_headline(read), path, _pictures.LIGHT)
    return path


def _has_headline(run: Run) -> bool:
    return run.metric is not None or "reward/mean" in run.curves


def _headline(run: Run) -> Any:
    # Beside the metric of the headline, the widest pass@K: whether the right answer is among the samples at all.
    passes = [name for name in run.held_out if name.startswith("val/pass@") and name not in (run.metric, "val/pass@1")]
    if run.metric and run.before is not None and run.after is not None:
        title = f"Held-out {_pictures.short(run.metric)}: {run.before:.2f} → {run.after:.2f}"
    else:
        title = "Held-out accuracy and training reward"
    return partial(_pictures.headline, run.curves, run.metric, passes[-1:], title)


def _run_page(run: Run) -> str:
    folder = run.folder / "report"
    main = None
    if _has_headline(run):
        smoothing = _pictures.smoothing_note(run.curves, ["reward/mean"])
        caption = "Held-out accuracy at every validation" if run.metric else "No validation was logged"
        caption += f"; mean reward of the completions trained on ({smoothing})." if smoothing else "."
        main = _pictures.saved(_headline(run), folder, "headline", "Held-out accuracy and training reward", caption)
    small = []
    for panel in _pictures.panels(run.curves):
        draw = partial(_pictures.small, panel, run.curves)
        small.append(_pictures.saved(draw, folder, panel.name, panel.title, panel.hint))
    columns = [name for panel in _pictures.panels(run.curves) for name in panel.columns]
    return _rendered(
        "run",
        run=run,
        composed=composition(run),
        time=None if run.seconds is None else duration(run.seconds),
        errors=_standard_errors(run),
        main=main,
        small=small,
        smoothing=_pictures.smoothing_note(run.curves, columns),
        held_out=[_held_out(name, run.curves[name]) for name in run.held_out],
        pairs=_pairs(run),
        credit=_credit(run),
        logged=[_extremes(name, run.curves[name]) for name in sorted(run.curves)],
        most_tokens=MOST_TOKENS,
        shown_pairs=SHOWN_PAIRS,
    )


def _write(path: Path, page: str) -> Path:
    # A completion may hold half of a surrogate pair, which has no UTF-8.
    path.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{whole // 60} min {whole % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _standard_errors(run: Run) -> tuple[float, float] | None:
    """An upper bound: a problem's score lies in [0, 1], so its variance is at most p (1 - p). Exact for mean@1."""
    if (
        not run.problems
        or run.before is None
        or run.after is None
        or not (0 <= run.before <= 1 and 0 <= run.after <= 1)
    ):
        return None
    before, after = (math.sqrt(p * (1 - p) / run.problems) for p in (run.before, run.after))
    return before, after


def _held_out(name: str, curve: Mapping[int, float]) -> dict[str, Any]:
    best = max(curve, key=lambda step: curve[step])
    last = curve[max(curve)] if len(curve) > 1 else None
    return {
        "name": _pictures.short(name),
        "first": curve[min(curve)],
        "last": last,
        "best": curve[best],
        "best_step": best,
    }


def _extremes(name: str, curve: Mapping[int, float]) -> dict[str, Any]:
    values = list(curve.values())
    ends = {"first": values[0], "last": values[-1], "low": min(values), "high": max(values)}
    return {"name": name, "points": len(values), **ends}


def _pairs(run: Run) -> dict[str, Any]:
    """The first validation's samples, each beside the last validation's of the same problem."""
    validation = [sample for sample in run.samples if sample.when == "validation"]
    steps = sorted({sample.step for sample in validation})
    if not steps:
        return {"rows": [], "steps": [], "counts": {}}
    before = [sample for sample in validation if sample.step == steps[0]]
    rows: list[tuple[Sample, Sample | None]] = [(sample, None) for sample in before]
    if len(steps) > 1:
        # The problems stand in the same order; but a line may be broken, so the prompt decides, in order of appearance.
        later: dict[str, list[Sample]] = {}
        for sample in validation:
            if sample.step == steps[-1]:
                later.setdefault(sample.prompt, []).append(sample)
        rows = [(sample, later[sample.prompt].pop(0) if later.get(sample.prompt) else None) for sample in before]
    kinds = [(first.right, last.right) for first, last in rows if last is not None]
    counts = {
        "became right": kinds.count((False, True)),
        "stayed right": kinds.count((True, True)),
        "stayed wrong": kinds.count((False, False)),
        "became wrong": kinds.count((True, False)),
    }
    return {
        "rows": rows[:MOST_PAIRS],
        "steps": [steps[0], steps[-1]],
        "counts": counts if kinds else {},
        "all": len(rows),
    }


def _credit(run: Run) -> dict[str, Any] | None:
    """The first and the last recorded step's samples by token, right and wrong ones in turn, on one scale for all."""
    recorded = [sample for sample in run.samples if sample.tokens]
    if not recorded:
        return None
    steps = sorted({sample.step for sample in recorded})
    chosen = {step: _in_turn([s for s in recorded if s.step == step])[:4] for step in sorted({steps[0], steps[-1]})}
    shown = [sample for samples in chosen.values() for sample in samples]
    most = max(abs(a) for sample in shown for a in sample.advantages)
    means = [statistics.fmean(sample.advantages) for sample in shown]
    spread = max(abs(a - mean) for sample, mean in zip(shown, means, strict=True) for a in sample.advantages)
    entropy = max(h for sample in shown for h in sample.entropy)
    # Sums of floats leave a residue: what is equal is shown as equal.
    spread = spread if spread > 1e-6 * most else 0.0
    return {
        "steps": {step: [(s, list(_spans(s, most, spread, entropy))) for s in part] for step, part in chosen.items()},
        "most": most,
        "spread": spread,
        "entropy": entropy,
    }


def _in_turn(samples: Sequence[Sample]) -> list[Sample]:
    """One that gained, one that lost, and so on; a completion without any advantage comes last."""
    gained = [s for s in samples if sum(s.advantages) > 0]
    lost = [s for s in samples if sum(s.advantages) < 0]
    rest = [s for s in samples if sum(s.advantages) == 0]
    turns = [s for pair in zip(gained, lost, strict=False) for s in pair]
    return [*turns, *gained[len(lost) :], *lost[len(gained) :], *rest]


def _spans(sample: Sample, most: float, spread: float, entropy: float) -> Iterator[dict[str, Any]]:
    mean = statistics.fmean(sample.advantages)
    for token, advantage, nats in list(zip(sample.tokens, sample.advantages, sample.entropy, strict=True))[
        :MOST_TOKENS
    ]:
        apart = advantage - mean
        yield {
            "text": token,
            "sign": "p" if advantage > 0 else "n",
            "apart_sign": "dp" if apart > 0 else "dn",
            "percent": round(DEEPEST * abs(advantage) / most) if most else 0,
            "apart_percent": round(DEEPEST * abs(apart) / spread) if spread else 0,
            "entropy_percent": round(100 * max(nats, 0.0) / entropy) if entropy > 0 else 0,
            "hover": f"advantage {advantage:+.3f} ({apart:+.3f} from its completion's mean), entropy {nats:.3f} nats",
        }


# Several runs --------------------------------------------------------------------------------------------------------

COMPARED = (
    ("reward/mean", "Mean training reward"),
    ("completions/entropy", "Entropy (nats a token)"),
    ("completions/length", "Completion length (tokens)"),
)


def _run_folders(given: Path) -> list[Path]:
    """The folder itself, or the runs in it, run 10 after run 9."""
    if (given / "metrics.csv").is_file():
        return [given]
    inside = [path.parent for path in given.glob("*/metrics.csv")]
    if not inside:
        read_run(given)  # raises, and says what a run folder is
    return sorted(inside, key=_natural)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", path.name)]


def labels(runs: Sequence[Run]) -> list[str]:
    """What differs between the runs: the overrides that not all of them share, else the folder's name."""
    common = set.intersection(*(set(run.overrides) for run in runs))
    names = [", ".join(o for o in run.overrides if o not in common) or run.folder.resolve().name for run in runs]
    twice = {name for name in names if names.count(name) > 1}
    return [f"{n} [{run.folder.resolve().name}]" if n in twice else n for n, run in zip(names, runs, strict=True)]


def without_seed(runs: Sequence[Run]) -> list[str]:
    """The label of the group that a run is in: runs that differ in nothing but the seed are one group."""
    common = set.intersection(*(set(run.overrides) for run in runs))
    kept = [", ".join(o for o in run.overrides if o not in common and not o.startswith("seed=")) for run in runs]
    seeded = [any(o.startswith("seed=") for o in run.overrides) for run in runs]
    return [group if group and seed else name for group, seed, name in zip(kept, seeded, labels(runs), strict=True)]


def _comparison_page(folder: Path, runs: Sequence[Run]) -> str:
    names, group_of = labels(runs), without_seed(runs)
    groups: dict[str, list[Run]] = {}
    for run, group in zip(runs, group_of, strict=True):
        groups.setdefault(group, []).append(run)
    metric = next((run.metric for run in runs if run.metric), None)
    pictures = []
    held_out = ((metric, f"Held-out {_pictures.short(metric)}"),) if metric else ()
    for column, title in (*held_out, *COMPARED):
        curves = {g: [run.curves[column] for run in part if column in run.curves] for g, part in groups.items()}
        curves = {group: part for group, part in curves.items() if part}
        if not curves:
            continue
        width = max(_pictures.window(len(curve)) for part in curves.values() for curve in part)
        smoothed = f"Centred mean over {width} steps." if width > 1 else "As logged."
        caption = "At every validation." if column == metric else smoothed
        is_accuracy = column == metric
        draw = partial(_draw_overlaid, curves, is_accuracy)
        file = "comparison-" + column.replace("/", "-").replace("@", "-at-")
        pictures.append(_pictures.saved(draw, folder / "report", file, title, caption))
    rows = [_row(folder, run, name, metric) for run, name in zip(runs, names, strict=True)]
    finals = [row["after"] for row in rows if row["after"] is not None]
    return _rendered(
        "comparison",
        folder=folder.resolve().name,
        metric=_pictures.short(metric) if metric else None,
        rows=rows,
        best=max(finals) if len(finals) > 1 else None,
        seeds=[_over_seeds(name, part) for name, part in groups.items()] if len(groups) < len(runs) else [],
        pictures=pictures,
        shared=[o for o in runs[0].overrides if all(o in run.overrides for run in runs)] if len(runs) > 1 else [],
        notes=[
            f"{name}: {note}"
            for name, run in zip(names, runs, strict=True)
            for note in run.notes
            if not note.startswith("samples.jsonl")
        ],
    )


def _draw_overlaid(
    curves: Mapping[str, Sequence[Mapping[int, float]]], is_accuracy: bool, theme: _pictures.Theme
) -> Any:
    return _pictures.overlaid(curves, is_accuracy=is_accuracy, points=is_accuracy, theme=theme)


def _row(folder: Path, run: Run, name: str, metric: str | None) -> dict[str, Any]:
    page = run.folder / "report.html"
    near = page.is_file() and page.resolve().is_relative_to(folder.resolve())
    curve = run.curves.get(metric or "", {})
    return {
        "name": name,
        "metric": _pictures.short(run.metric) if run.metric not in (None, metric) else None,
        "page": page.resolve().relative_to(folder.resolve()).as_posix() if near else None,
        "before": run.before,
        "after": run.after,
        "gain": None if run.before is None or run.after is None else run.after - run.before,
        "best": max(curve.values()) if curve else None,
        "steps": run.steps,
        "time": None if run.seconds is None else duration(run.seconds),
        "seed": run.seed,
        "completed": run.completed,
    }


def _over_seeds(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    finals = [run.after for run in runs if run.after is not None]
    if not finals:
        return {"name": name, "runs": 0, "mean": None, "low": None, "high": None}
    return {
        "name": name,
        "runs": len(finals),
        "mean": statistics.fmean(finals),
        "low": min(finals),
        "high": max(finals),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rlmod-report", description="Writes what a run did, or how runs compare, as one page."
    )
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="a run folder, or the folder of a multirun")
    given = parser.parse_args(argv).run
    try:
        print(write_report(given[0], given[1:]))
    except ValueError as error:
        parser.error(str(error))


# The pages as HTML: no scripts, no files beside them; jinja2 escapes whatever a run put in ---------------------------

STYLE = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #ffffff; --ink: #1d2430; --faint: #626b77; --line: #e1e5ea;
  --blue: #1f6fc4; --orange: #b8500c; --plus: #2f86dd; --minus: #e8604c; --soft: #eef2f7;
  --warn: #fff4df; --warn-line: #e0a93b; }
@media (prefers-color-scheme: dark) { :root { --page: #11141a; --card: #1a1e25; --ink: #e4e8ee; --faint: #98a2af;
  --line: #2d333d; --blue: #5ba6f2; --orange: #f2995a; --plus: #3f8be0; --minus: #d4503f; --soft: #232933;
  --warn: #2e2716; --warn-line: #8f6f28; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 1.4rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }
h1.stages { display: flex; flex-wrap: wrap; gap: 6px 26px; }
h1 small { display: block; color: var(--faint); font-size: 0.8rem; font-weight: 400; }
h2 { font-size: 1.15rem; margin: 36px 0 10px; }
h3 { font-size: 0.95rem; margin: 0; }
p { margin: 6px 0; max-width: 46rem; }
a { color: var(--blue); }
.faint, figcaption { color: var(--faint); font-size: 0.86rem; }
.kicker { color: var(--faint); font-size: 0.9rem; margin: 0 0 2px; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; margin: 12px 0 0; padding: 0; list-style: none; font-size: 0.88rem; }
.chips li { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 2px 9px; }
.chips b { color: var(--faint); font-weight: 400; margin-right: 3px; }
.card, figure, .notes { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0; }
.card, figure { padding: 14px 16px; }
.notes { background: var(--warn); border-color: var(--warn-line); padding: 10px 16px; margin-top: 18px; }
.notes ul { margin: 4px 0; padding-left: 20px; overflow-wrap: anywhere; }
.big { margin: 22px 0 14px; }
.big .numbers { font-size: clamp(2rem, 6vw, 3rem); font-weight: 700; line-height: 1.15; }
.big .numbers span { color: var(--faint); font-weight: 400; }
.big .numbers .gain { color: var(--blue); } .big .numbers .loss { color: var(--orange); }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: 6px; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(3, minmax(0, 1fr)); }
.two { display: grid; gap: 14px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
@media (max-width: 900px) { .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .two { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 520px) { .grid { grid-template-columns: 1fr; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: 5px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; } th:first-child, td:first-child { text-align: left; padding-left: 2px; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
tr:last-child td { border-bottom: 0; } .most { font-weight: 700; }
@media (max-width: 900px) { th, td { padding: 5px 7px; } td:first-child { min-width: 9rem; } }
pre, .text, .tokens, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { font-size: 0.8rem; overflow: auto; margin: 8px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.text { font-size: 0.86rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow: auto; }
.pair { margin: 0 0 10px; padding: 10px 14px 12px; }
.prompt { display: flex; gap: 4px 18px; justify-content: space-between; margin-bottom: 8px; }
.prompt .text { min-width: 0; } .prompt .faint { flex: 0 1 auto; max-width: 40%; overflow-wrap: anywhere; }
.sides { display: grid; gap: 12px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
@media (max-width: 520px) { .sides { grid-template-columns: 1fr; } }
.side { border-left: 4px solid var(--orange); background: var(--soft); border-radius: 4px; padding: 6px 10px;
  min-width: 0; }
.side.right { border-color: var(--blue); }
.verdict { font-size: 0.82rem; color: var(--orange); font-weight: 600; } .right > .verdict { color: var(--blue); }
.verdict .faint { font-weight: 400; font-size: inherit; }
.credit h3 { margin: 12px 0 6px; }
.tokens { font-size: 0.95rem; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 4px; }
.tokens span { padding: 2px 1px; border-radius: 2px; cursor: help; margin-right: 1px;
  border-bottom: 3px solid color-mix(in srgb, var(--ink) var(--h), transparent); }
.p { background: color-mix(in srgb, var(--plus) var(--a), transparent); }
.n { background: color-mix(in srgb, var(--minus) var(--a), transparent); }
#apart:checked ~ * .dp { background: color-mix(in srgb, var(--plus) var(--d), transparent); }
#apart:checked ~ * .dn { background: color-mix(in srgb, var(--minus) var(--d), transparent); }
.when-apart, #apart:checked ~ * .when-whole { display: none; } #apart:checked ~ * .when-apart { display: inline; }
.credit > label { font-size: 0.9rem; margin-right: 14px; cursor: pointer; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; align-items: center; margin: 10px 0; font-size: 0.86rem; }
.bar { display: inline-block; width: 150px; height: 12px; border-radius: 2px; margin: 0 6px; vertical-align: -1px;
  background: linear-gradient(to right, color-mix(in srgb, var(--minus) 75%, var(--card)), var(--card),
    color-mix(in srgb, var(--plus) 75%, var(--card))); }
.line { display: inline-block; width: 90px; height: 4px; margin: 0 6px; vertical-align: 3px;
  background: linear-gradient(to right, transparent, var(--ink)); }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--blue); }
"""

PARTS = """
{% macro accuracy(value) %}{{ "-" if value is none else "%.3f" | format(value) }}{% endmacro %}
{% macro shown(picture, wide=False) %}
<figure id="{{ picture.name }}">{% if not wide %}<h3>{{ picture.title }}</h3>{% endif %}
<picture><source srcset="{{ picture.dark }}" media="(prefers-color-scheme: dark)">
<img src="{{ picture.light }}" alt="{{ picture.title }}"></picture>
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endmacro %}
{% macro verdict(sample) %}
<div class="verdict">{{ "✓ right" if sample.right else "✗ wrong" }}
<span class="faint">reward {{ "%.3g" | format(sample.reward) }}
{%- if sample.length is not none %} · {{ sample.length }} tokens{% endif %}
{%- if sample.truncated %} · truncated{% endif -%}
</span></div>
{% endmacro %}
{% macro side(sample) %}
<div class="side {{ "right" if sample.right }}">{{ verdict(sample) }}
<div class="text">{{ sample.completion }}</div></div>
{% endmacro %}
{% macro pair(first, last) %}
<div class="card pair"><div class="prompt"><div class="text">{{ first.prompt }}</div>
{% if first.answer %}<div class="faint">answer <code>{{ first.answer }}</code></div>{% endif %}</div>
<div class="sides">{{ side(first) }}{% if last is not none %}{{ side(last) }}{% endif %}</div></div>
{% endmacro %}
"""

LAYOUT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% block title %}{% endblock %}</title><style>{{ style }}</style></head>
<body><main>{% block body %}{% endblock %}</main></body></html>
"""

RUN_PAGE = """{% extends "layout" %}
{% from "parts" import accuracy, shown, verdict, pair %}
{% block title %}{{ composed.get("shaper") or run.folder.resolve().name }} · rlmod run{% endblock %}
{% block body %}
<p class="kicker">rlmod run · {{ run.folder.resolve().name }}</p>
{% if composed %}
<h1 class="stages">{% for stage, name in composed.items() %}
<span><small>{{ stage }}</small>{{ name }}</span>{% endfor %}</h1>
{% else %}<h1>Composition not known</h1>{% endif %}
<ul class="chips">
{% if run.seed is not none %}<li><b>seed</b> {{ run.seed }}</li>{% endif %}
<li><b>steps</b> {{ "{:,}".format(run.steps) }}</li>
{% if time %}<li><b>training</b> {{ time }}</li>{% endif %}
{% if run.result.tokens is number %}<li><b>tokens</b> {{ "{:,}".format(run.result.tokens) }}</li>{% endif %}
</ul>
{% if run.notes %}<div class="notes"><b>What is missing or broken</b>
<ul>{% for note in run.notes %}<li>{{ note }}</li>{% endfor %}</ul></div>{% endif %}

<div class="big">
{% if run.before is not none and run.after is not none %}
{% set gain = run.after - run.before %}
<div>held-out {{ short(run.metric or "accuracy") }}</div>
<div class="numbers">{{ "%.2f" | format(run.before) }} <span>→</span> {{ "%.2f" | format(run.after) }}
<span class="{{ "gain" if gain >= 0 else "loss" }}">({{ "%+.2f" | format(gain) }})</span></div>
<div class="faint">{% if run.problems %}on {{ "{:,}".format(run.problems) }} problems{% endif %}
{%- if errors %}; standard error {{ "%.3f" | format(errors[0]) }} before, {{ "%.3f" | format(errors[1]) }} after
{%- if run.metric != "val/mean@1" %} at most{% endif %}{% endif %}</div>
{% elif run.before is not none or run.after is not none %}
<div>held-out {{ short(run.metric or "accuracy") }}</div>
<div class="numbers">{{ "%.2f" | format(run.before if run.before is not none else run.after) }}</div>
<div class="faint">{{ "before training; no later validation was logged" if run.before is not none
  else "at the last validation; none was logged before training" }}</div>
{% else %}<div>No held-out accuracy was logged.</div>{% endif %}
</div>

{% if main %}{{ shown(main, wide=True) }}{% endif %}
{% if held_out | length > 1 %}
<h2>Every held-out metric</h2>
<div class="card scroll"><table><tr><th>metric</th><th>first</th><th>last</th><th>best</th><th>at step</th></tr>
{% for row in held_out %}<tr><td>{{ row.name }}</td><td>{{ accuracy(row.first) }}</td><td>{{ accuracy(row.last) }}</td>
<td>{{ accuracy(row.best) }}</td><td>{{ row.best_step }}</td></tr>{% endfor %}</table></div>
{% endif %}

{% if small %}
<h2>How the training went</h2>
<div class="grid">{% for picture in small %}{{ shown(picture) }}{% endfor %}</div>
{% if smoothing %}<p class="faint">Lines, {{ smoothing }}. Areas and dashes: the average alone.</p>{% endif %}
{% endif %}

{% if pairs.rows %}
<h2>Held-out samples{% if pairs.counts %}, before and after{% endif %}</h2>
{% if pairs.counts %}
<p>Left at step {{ pairs.steps[0] }}, right at step {{ pairs.steps[1] }}, the same problems.
Of the {{ pairs.counts.values() | sum }} recorded:
{% for kind, count in pairs.counts.items() %}{{ count }} {{ kind }}{{ ", " if not loop.last else "." }}{% endfor %}</p>
{% else %}
<p>Only the validation at step {{ pairs.steps[0] }} is recorded: there is nothing to set beside it.</p>{% endif %}
{% for first, last in pairs.rows[:shown_pairs] %}{{ pair(first, last) }}{% endfor %}
{% if pairs.rows | length > shown_pairs %}
<details><summary>{{ pairs.rows | length - shown_pairs }} more
{%- if pairs.all > pairs.rows | length %} (of {{ pairs.all - shown_pairs }}){% endif %}</summary><div>
{% for first, last in pairs.rows[shown_pairs:] %}{{ pair(first, last) }}{% endfor %}</div></details>{% endif %}
{% endif %}

{% if credit %}
<h2>Where {{ composed.get("shaper") or "the shaper" }} puts its credit</h2>
<div class="credit">
<p>Completions that were trained on, token by token. The colour is the advantage, the underline the entropy
of the policy that sampled the token; hover for the numbers.</p>
<input type="radio" name="colour" id="whole" checked> <label for="whole">advantage</label>
<input type="radio" name="colour" id="apart"> <label for="apart">its distance from the completion's mean</label>
<div class="legend"><span><span class="when-whole">&minus;{{ "%.2f" | format(credit.most) }}</span>
<span class="when-apart">&minus;{{ "%.3f" | format(credit.spread) }}</span><span class="bar"></span>
<span class="when-whole">+{{ "%.2f" | format(credit.most) }}</span>
<span class="when-apart">+{{ "%.3f" | format(credit.spread) }}</span> advantage</span>
<span>0<span class="line"></span>{{ "%.2f" | format(credit.entropy) }} nats of entropy</span></div>
{% if credit.spread == 0 %}
<p class="faint">Within each of these completions every token has the same advantage.</p>{% endif %}
{% for step, samples in credit.steps.items() %}
<div><h3>step {{ step }}</h3><div class="two">
{% for sample, spans in samples %}
<div class="card {{ "right" if sample.right }}">{{ verdict(sample) }}<div class="text faint">{{ sample.prompt }}</div>
<div class="tokens">{% for span in spans -%}
<span class="{{ span.sign }} {{ span.apart_sign }}" title="{{ span.hover }}" style="--a:{{ span.percent }}%;
{#- #}--d:{{ span.apart_percent }}%;--h:{{ span.entropy_percent }}%">{{ span.text }}</span>
{%- endfor %}</div>
{% if sample.tokens | length > most_tokens %}
<div class="faint">and {{ "{:,}".format(sample.tokens | length - most_tokens) }} more tokens</div>{% endif %}
</div>{% endfor %}</div></div>{% endfor %}
</div>
{% endif %}

<h2>What to watch</h2>
<p>On-policy, with one update for each collection, the loss is about 0 by construction (the advantages cancel and every
ratio is 1), so it says nothing about progress. Watch the reward and the held-out accuracy first, then the entropy
(falling to 0 is collapse) and the length with the truncated share (both rising is runaway).</p>

{% if logged %}<details><summary>Everything that was logged</summary><div class="card scroll">
<table><tr><th>metric</th><th>points</th><th>first</th><th>last</th><th>lowest</th><th>highest</th></tr>
{% for row in logged %}<tr><td>{{ row.name }}</td><td>{{ row.points }}</td>
{% for value in (row.first, row.last, row.low, row.high) %}<td>{{ "%.4g" | format(value) }}</td>{% endfor %}</tr>
{% endfor %}</table></div></details>{% endif %}
{% if run.config_text %}<details><summary>The resolved config</summary><div class="card">
{% if run.overrides %}
<div class="faint">composed with <code>rlmod-train {{ run.overrides | join(" ") }}</code></div>{% endif %}
<pre>{{ run.config_text }}</pre></div></details>{% endif %}
{% if run.result.versions is mapping %}<p class="faint">
{% for name, version in run.result.versions.items() %}{{ name }} {{ version }}{{ " · " if not loop.last }}{% endfor %}
</p>{% endif %}
{% endblock %}
"""

COMPARISON_PAGE = """{% extends "layout" %}
{% from "parts" import accuracy, shown %}
{% block title %}{{ rows | length }} runs · {{ folder }}{% endblock %}
{% block body %}
<p class="kicker">rlmod comparison · {{ folder }}</p>
<h1>{{ rows | length }} {{ "run" if rows | length == 1 else "runs" }} compared
{%- if metric %} by held-out {{ metric }}{% endif %}</h1>
{% if shared %}<p class="faint">All of them: <code>{{ shared | join(" ") }}</code></p>{% endif %}
{% if notes %}<div class="notes"><ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul></div>{% endif %}
{% if seeds %}
<h2>Over the seeds</h2>
<div class="card scroll"><table>
<tr><th>what differs</th><th>runs</th><th>mean after</th><th>lowest</th><th>highest</th></tr>
{% for row in seeds %}<tr><td>{{ row.name }}</td><td>{{ row.runs }}</td><td>{{ accuracy(row.mean) }}</td>
<td>{{ accuracy(row.low) }}</td><td>{{ accuracy(row.high) }}</td></tr>{% endfor %}</table></div>
{% endif %}
<h2>Final held-out accuracy</h2>
<div class="card scroll"><table>
<tr><th>run</th><th>before</th><th>after</th><th>gain</th><th>best</th><th>steps</th><th>training</th><th>seed</th></tr>
{% for row in rows %}
<tr><td>{% if row.page %}<a href="{{ row.page | urlencode }}">{{ row.name }}</a>{% else %}{{ row.name }}{% endif %}
{%- if row.metric %} <span class="faint">({{ row.metric }})</span>{% endif %}
{%- if not row.completed %} <span class="faint">(not completed)</span>{% endif %}</td>
<td>{{ accuracy(row.before) }}</td>
<td{% if best is not none and row.after == best %} class="most"{% endif %}>{{ accuracy(row.after) }}</td>
<td>{{ "-" if row.gain is none else "%+.3f" | format(row.gain) }}</td>
<td>{{ accuracy(row.best) }}</td>
<td>{{ "{:,}".format(row.steps) }}</td>
<td>{{ row.time or "-" }}</td>
<td>{{ row.seed if row.seed is not none else "-" }}</td></tr>
{% endfor %}</table></div>
<p class="faint">After: at the last validation. Best: the highest of all validations, which flatters noisy runs.</p>
{% if pictures %}<h2>Curves</h2>
<div class="two">{% for picture in pictures %}{{ shown(picture) }}{% endfor %}</div>{% endif %}
{% endblock %}
"""

PAGES = {"layout": LAYOUT, "parts": PARTS, "run": RUN_PAGE, "comparison": COMPARISON_PAGE}


def _rendered(page: str, **values: Any) -> str:
    # Autoescape holds for every name here: the default would tell HTML by a file ending, which these have not.
    environment = Environment(
        loader=DictLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(page).render(style=Markup(STYLE), short=_pictures.short, **values)


if __name__ == "__main__":
    main()
