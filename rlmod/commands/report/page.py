"""The page of one run: the headline, the small pictures, samples before and after, credit by token, what was logged."""

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlmod.commands.report import panels, pictures, plots
from rlmod.commands.report.curves import reward_terms, short, smoothing_note
from rlmod.commands.report.html import duration, rendered
from rlmod.commands.report.runs import Run, Sample

MOST_PAIRS = 60
SHOWN_PAIRS = 6
"""Number of before-and-after samples shown; the others are folded."""
DEEPEST = 75
"""Per cent of colour at the largest advantage: the text stays readable on it."""
MOST_TOKENS = 500
"""Most tokens of one sample in the token view: a page of 100,000 coloured spans cannot be scrolled."""


def run_page(run: Run) -> str:
    folder = run.folder / "report"
    main = None
    if has_headline(run):
        smoothing = smoothing_note(run.curves, ["reward/mean"])
        caption = "Held-out accuracy at every validation" if run.metric else "No validation was logged"
        caption += f"; mean reward of the completions trained on ({smoothing})." if smoothing else "."
        main = pictures.saved(headline(run), folder, "headline", "Held-out accuracy and training reward", caption)
    small = []
    for panel in panels.logged(run.curves):
        draw = partial(panels.small, panel, run.curves)
        small.append(pictures.saved(draw, folder, panel.name, panel.title, panel.hint))
    columns = [name for panel in panels.logged(run.curves) for name in panel.columns]
    return rendered(
        "run",
        run=run,
        composed=composition(run),
        time=None if run.seconds is None else duration(run.seconds),
        errors=_standard_errors(run),
        main=main,
        small=small,
        smoothing=smoothing_note(run.curves, columns),
        held_out=[_held_out(name, run.curves[name]) for name in run.held_out],
        pairs=_pairs(run),
        credit=_credit(run),
        logged=[_extremes(name, run.curves[name]) for name in sorted(run.curves)],
        most_tokens=MOST_TOKENS,
        shown_pairs=SHOWN_PAIRS,
    )


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
        "name": short(name),
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


def has_headline(run: Run) -> bool:
    return run.metric is not None or "reward/mean" in run.curves


def headline(run: Run) -> Any:
    # AsyncRewards the metric of the headline, the widest pass@K: whether the correct answer is among the samples at all.
    passes = [name for name in run.held_out if name.startswith("val/pass@") and name not in (run.metric, "val/pass@1")]
    if run.metric and run.before is not None and run.after is not None:
        title = f"Held-out {short(run.metric)}: {run.before:.2f} → {run.after:.2f}"
    else:
        title = "Held-out accuracy and training reward"
    return partial(plots.headline, run.curves, run.metric, passes[-1:], title)


def composition(run: Run) -> dict[str, str]:
    """Stage -> name, as it is called on the command line. A stage that the config does not have is left out."""
    named = {stage: _name(run.config.get(stage)) for stage in ("policy", "shaper", "loss", "aggregation")}
    terms = [term.removeprefix("reward/") for term in reward_terms(run.curves)]
    named["reward"] = " + ".join(terms or sorted(set(_targets(run.config.get("reward")))))
    return {stage: name for stage, name in named.items() if name}


def _name(component: object) -> str:
    """Return a policy's path or hub name, else the class in snake_case, which is its key on the command line."""
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
