"""The contents of a run folder: metrics.csv, config.yaml, samples.jsonl and result.json.

Only metrics.csv is required, so that a killed run can be reported too; ``notes`` say what is missing.
"""

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from rlmod.commands.report.curves import Curves

KINDS = ("mean", "pass", "maj", "best")
HELD_OUT = re.compile(rf"val/(?:(?P<set>[^/]+)/)?(?P<kind>{'|'.join(KINDS)})@(?P<k>\d+)")
"""A column of a validation metric; ``set`` is the name of a benchmark."""
CORRECT_ABOVE = 0.5
"""A sample is marked correct if its reward is above this value, as in the shapers."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A line of samples.jsonl. The tuples are empty if the line has no values per token."""

    step: int
    when: str
    prompt: str
    answer: str
    completion: str
    reward: float | None
    """None: the reward abstained."""
    truncated: bool = False
    length: int | None = None
    tokens: tuple[str, ...] = ()
    entropy: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()

    @property
    def correct(self) -> bool:
        return self.reward is not None and self.reward > CORRECT_ABOVE


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """The contents of a run folder. Missing files leave empty fields and a sentence in ``notes``."""

    folder: Path
    curves: Curves
    result: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    overrides: tuple[str, ...] = ()
    """Overrides as given on the command line."""
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def held_out(self) -> list[str]:
        """Columns of validation metrics: those of the held-out problems, then of each benchmark; mean@K first, small K first."""
        found = [match for name in self.curves if (match := HELD_OUT.fullmatch(name))]
        found.sort(key=lambda match: (match["set"] or "", KINDS.index(match["kind"]), int(match["k"])))
        return [match[0] for match in found]

    @property
    def metric(self) -> str | None:
        """Column of the main picture: the one that result.json names, otherwise the first of ``held_out``."""
        named = _mapping(self.result, "held_out").get("metric")
        return named if isinstance(named, str) and named in self.curves else next(iter(self.held_out), None)

    @property
    def before(self) -> float | None:
        """Held-out accuracy before training."""
        return self._accuracy("before")

    @property
    def after(self) -> float | None:
        """Held-out accuracy at the last validation; ``validated_at`` says if training went on after it."""
        return self._accuracy("after")

    @property
    def validated_at(self) -> int | None:
        """Optimizer step of the last validation, if the run went on after it; None if ``after`` is the accuracy after the last step."""
        if _is_number(_mapping(self.result, "held_out").get("after")) or not self.metric:
            return None
        last = max(self.curves[self.metric], default=0)
        return last if 0 < last < self.steps else None

    def _accuracy(self, when: str) -> float | None:
        """Return the accuracy from result.json, or from metrics.csv if the run was killed; None without that validation."""
        held_out = _mapping(self.result, "held_out")
        if _is_number(held_out.get(when)) and self.metric in (None, held_out.get("metric", self.metric)):
            return float(held_out[when])
        curve = self.curves[self.metric] if self.metric else {}
        if when == "before":
            return curve.get(0)
        return curve[max(curve)] if curve and max(curve) > 0 else None

    @property
    def problems(self) -> int | None:
        """Number of held-out problems."""
        value = _mapping(self.result, "held_out").get("problems")
        return int(value) if _is_number(value) else None

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        logged = max((max(curve) for curve in self.curves.values()), default=0)
        steps = self.result.get("steps")
        return int(steps) if _is_number(steps) else logged

    @property
    def seconds(self) -> float | None:
        """Seconds of training."""
        value = _mapping(self.result, "seconds").get("training")
        return float(value) if _is_number(value) else None

    @property
    def seed(self) -> object:
        return self.result.get("seed", self.config.get("seed"))

    @property
    def completed(self) -> bool:
        return self.result.get("completed") is True


def read_run(folder: Path) -> RecordedRun:
    """Read a run folder. Raise ValueError if it has no metrics.csv, or one that cannot be read."""
    if not (folder / "metrics.csv").is_file():
        raise ValueError(
            f"{folder} is not a run folder: it has no metrics.csv. rlmod-train writes run folders, with metrics.csv, "
            "config.yaml, samples.jsonl and result.json; the folder of a Hydra multirun holds several"
        )
    notes: list[str] = []
    try:
        curves = _read_curves(folder / "metrics.csv", notes)
    except (OSError, csv.Error) as error:
        raise ValueError(f"{folder / 'metrics.csv'} cannot be read: {error}") from error
    config_text = _read_text(folder / "config.yaml", "the composition is not known", notes)
    samples = _read_samples(folder / "samples.jsonl", notes)
    result = _read_result(folder / "result.json", notes)
    return RecordedRun(
        folder=folder,
        curves=curves,
        result=result,
        config=_parse_yaml(config_text, notes),
        config_text=config_text,
        overrides=_read_overrides(folder / ".hydra" / "overrides.yaml"),
        samples=samples,
        notes=tuple(notes),
    )


def _read_curves(path: Path, notes: list[str]) -> Curves:
    """Read metrics.csv. A cell is empty if its metric was not logged at that step. A resumed run's later row replaces the earlier one."""
    curves: dict[str, dict[int, float]] = {}
    unreadable = 0
    not_finite: dict[str, list[int]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(line.replace("\0", "") for line in file):
            step = _parse_number(row.pop("step", None))
            row.pop("epoch", None)
            if step is None or not 0 <= step < 2**63:
                unreadable += 1
                continue
            for name, cell in row.items():
                value = _parse_number(cell)
                if value is None:
                    unreadable += bool(cell)
                elif not math.isfinite(value):
                    not_finite.setdefault(name, []).append(int(step))
                else:
                    curves.setdefault(name, {})[int(step)] = value
    if not curves:
        notes.append("metrics.csv holds no values yet, so nothing is drawn.")
    if unreadable:
        notes.append(
            f"metrics.csv: {unreadable} {_plural(unreadable, 'cell or row', 'cells or rows')} could not be read."
        )
    for name, steps in not_finite.items():
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
                samples.append(_parse_sample(json.loads(line)))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                broken += 1
    if broken:
        lines = _plural(broken, "line is", "lines are")
        notes.append(
            f"samples.jsonl: {broken} {lines} broken and omitted (a run killed while writing leaves half a line)."
        )
    return tuple(samples)


def _parse_sample(record: Mapping[str, Any]) -> Sample:
    if not isinstance(record, dict) or not isinstance(record["completion"], str):
        raise TypeError("a sample must be a mapping with a completion")
    tokens, entropy, advantages = (record.get(name) or () for name in ("tokens", "entropy", "advantages"))
    per_token = bool(tokens) and len(tokens) == len(entropy) == len(advantages)
    return Sample(
        step=int(record["step"]),
        when=str(record["when"]),
        prompt=str(record["prompt"]),
        answer=" | ".join(map(str, answer)) if isinstance(answer := record.get("answer", ""), list) else str(answer),
        completion=record["completion"],
        reward=None if record["reward"] is None else float(record["reward"]),
        truncated=bool(record.get("truncated", False)),
        length=int(record["length"]) if _is_number(record.get("length")) else None,
        tokens=tuple(map(str, tokens)) if per_token else (),
        entropy=tuple(map(_finite_or_zero, entropy)) if per_token else (),
        advantages=tuple(map(_finite_or_zero, advantages)) if per_token else (),
    )


def _read_overrides(path: Path) -> tuple[str, ...]:
    try:
        overrides = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return ()  # only a run started on the command line has this file
    return tuple(map(str, overrides)) if isinstance(overrides, list) else ()


def _read_text(path: Path, consequence: str, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append(f"{path.name} is missing: {consequence}.")
        return ""


def _read_result(path: Path, notes: list[str]) -> Mapping[str, Any]:
    consequence = "the run was stopped before its end, so the numbers are the last in metrics.csv"
    text = _read_text(path, consequence, notes)
    if not text:
        return {}
    try:
        result = json.loads(text)
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict):
        notes.append(f"{path.name} is broken: {consequence}.")
        return {}
    if result.get("completed") is not True:
        notes.append("The run did not complete (result.json): the last numbers are those at which it stopped.")
    return result


def _parse_yaml(text: str, notes: list[str]) -> Mapping[str, Any]:
    try:
        value = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        value = text
    if isinstance(value, dict):
        return value
    if text:  # without the file there is a note already
        notes.append("config.yaml is broken: the composition is not known.")
    return {}


def _parse_number(cell: object) -> float | None:
    try:
        return float(cell) if isinstance(cell, str) and cell.strip() else None
    except ValueError:
        return None


def _finite_or_zero(value: object) -> float:
    return float(value) if _is_number(value) else 0.0


def _is_number(value: object) -> TypeGuard[float]:
    # Not math.isfinite: it fails for an integer of 400 digits.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
