"""The page of one run: the main picture, small pictures, samples before and after, advantages per token, all metrics."""

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlmod.commands.report import panels, pictures, plots
from rlmod.commands.report.curves import reward_terms, short_name, smoothing_note
from rlmod.commands.report.html import format_duration, render_page
from rlmod.commands.report.runs import RecordedRun, Sample

MOST_PAIRS = 60
"""Most before-and-after samples on the page."""
SHOWN_PAIRS = 6
"""Number of before-and-after samples shown; the others are collapsed."""
MAX_COLOUR_PERCENT = 75
"""Colour intensity at the largest advantage, in per cent, so that the text on it is readable."""
MOST_TOKENS = 500
"""Most tokens of one sample in the token view. A page with 100,000 coloured spans cannot be scrolled."""


def run_page(run: RecordedRun) -> str:
    """Draw the pictures into RUN/report, and return the page as HTML."""
    folder = run.folder / "report"
    main = None
    if has_headline(run):
        smoothing = smoothing_note(run.curves, ["reward/mean"])
        caption = "Held-out accuracy at every validation" if run.metric else "No validation was logged"
        caption += f"; mean reward of the completions trained on ({smoothing})." if smoothing else "."
        main = pictures.save_picture(
            draw_headline(run), folder, "headline", "Held-out accuracy and training reward", caption
        )
    small = []
    for panel in panels.logged_panels(run.curves):
        draw = partial(panels.draw_panel, panel, run.curves)
        small.append(pictures.save_picture(draw, folder, panel.name, panel.title, panel.hint))
    columns = [name for panel in panels.logged_panels(run.curves) for name in panel.columns]
    return render_page(
        "run",
        run=run,
        composed=composition(run),
        time=None if run.seconds is None else format_duration(run.seconds),
        errors=_standard_errors(run),
        main=main,
        small=small,
        smoothing=smoothing_note(run.curves, columns),
        held_out=[_held_out_row(name, run.curves[name]) for name in run.held_out],
        pairs=_sample_pairs(run),
        credit=_token_credit(run),
        logged=[_metric_row(name, run.curves[name]) for name in sorted(run.curves)],
        most_tokens=MOST_TOKENS,
        shown_pairs=SHOWN_PAIRS,
    )


def _standard_errors(run: RecordedRun) -> tuple[float, float] | None:
    """Return an upper bound of both standard errors, which is exact for mean@1.

    The score of a problem lies in [0, 1], so its variance is at most p (1 - p).
    """
    if (
        not run.problems
        or run.before is None
        or run.after is None
        or not (0 <= run.before <= 1 and 0 <= run.after <= 1)
    ):
        return None
    before, after = (math.sqrt(p * (1 - p) / run.problems) for p in (run.before, run.after))
    return before, after


def _held_out_row(name: str, curve: Mapping[int, float]) -> dict[str, Any]:
    best = max(curve, key=lambda step: curve[step])
    last = curve[max(curve)] if len(curve) > 1 else None
    return {
        "name": short_name(name),
        "first": curve[min(curve)],
        "last": last,
        "best": curve[best],
        "best_step": best,
    }


def _metric_row(name: str, curve: Mapping[int, float]) -> dict[str, Any]:
    values = list(curve.values())
    ends = {"first": values[0], "last": values[-1], "low": min(values), "high": max(values)}
    return {"name": name, "points": len(values), **ends}


def _sample_pairs(run: RecordedRun) -> dict[str, Any]:
    """Return the samples of the first validation, each with the sample of the same problem in the last validation."""
    validation = [sample for sample in run.samples if sample.when == "validation"]
    steps = sorted({sample.step for sample in validation})
    if not steps:
        return {"rows": [], "steps": [], "counts": {}}
    before = [sample for sample in validation if sample.step == steps[0]]
    rows: list[tuple[Sample, Sample | None]] = [(sample, None) for sample in before]
    if len(steps) > 1:
        # Problems are in the same order, but a line may be missing: match by prompt, in order of appearance.
        later: dict[str, list[Sample]] = {}
        for sample in validation:
            if sample.step == steps[-1]:
                later.setdefault(sample.prompt, []).append(sample)
        rows = [(sample, later[sample.prompt].pop(0) if later.get(sample.prompt) else None) for sample in before]
    kinds = [(first.correct, last.correct) for first, last in rows if last is not None]
    counts = {
        "became correct": kinds.count((False, True)),
        "stayed correct": kinds.count((True, True)),
        "stayed incorrect": kinds.count((False, False)),
        "became incorrect": kinds.count((True, False)),
    }
    return {
        "rows": rows[:MOST_PAIRS],
        "steps": [steps[0], steps[-1]],
        "counts": counts if kinds else {},
        "all": len(rows),
    }


def _token_credit(run: RecordedRun) -> dict[str, Any] | None:
    """Return the samples with values per token of the first and the last recorded step, on one scale for all.

    Completions with positive and with negative advantages alternate.
    """
    recorded = [sample for sample in run.samples if sample.tokens]
    if not recorded:
        return None
    steps = sorted({sample.step for sample in recorded})
    chosen = {step: _alternate([s for s in recorded if s.step == step])[:4] for step in sorted({steps[0], steps[-1]})}
    shown = [sample for samples in chosen.values() for sample in samples]
    most = max(abs(a) for sample in shown for a in sample.advantages)
    means = [statistics.fmean(sample.advantages) for sample in shown]
    spread = max(abs(a - mean) for sample, mean in zip(shown, means, strict=True) for a in sample.advantages)
    entropy = max(h for sample in shown for h in sample.entropy)
    # Rounding leaves a residue in sums of equal floats: show it as 0.
    spread = spread if spread > 1e-6 * most else 0.0
    return {
        "steps": {step: [(s, list(_spans(s, most, spread, entropy))) for s in part] for step, part in chosen.items()},
        "most": most,
        "spread": spread,
        "entropy": entropy,
    }


def _alternate(samples: Sequence[Sample]) -> list[Sample]:
    """Alternate samples with positive and negative advantages; samples without advantage come last."""
    positive = [s for s in samples if sum(s.advantages) > 0]
    negative = [s for s in samples if sum(s.advantages) < 0]
    zero = [s for s in samples if sum(s.advantages) == 0]
    alternating = [s for pair in zip(positive, negative, strict=False) for s in pair]
    return [*alternating, *positive[len(negative) :], *negative[len(positive) :], *zero]


def _spans(sample: Sample, most: float, spread: float, entropy: float) -> Iterator[dict[str, Any]]:
    """Yield text, colours and hover text of each token."""
    mean = statistics.fmean(sample.advantages)
    for token, advantage, nats in list(zip(sample.tokens, sample.advantages, sample.entropy, strict=True))[
        :MOST_TOKENS
    ]:
        apart = advantage - mean
        yield {
            "text": token,
            "sign": "p" if advantage > 0 else "n",
            "apart_sign": "dp" if apart > 0 else "dn",
            "percent": round(MAX_COLOUR_PERCENT * abs(advantage) / most) if most else 0,
            "apart_percent": round(MAX_COLOUR_PERCENT * abs(apart) / spread) if spread else 0,
            "entropy_percent": round(100 * max(nats, 0.0) / entropy) if entropy > 0 else 0,
            "hover": f"advantage {advantage:+.3f} ({apart:+.3f} from its completion's mean), entropy {nats:.3f} nats",
        }


def has_headline(run: RecordedRun) -> bool:
    """Return True if the run logged what the main picture shows."""
    return run.metric is not None or "reward/mean" in run.curves


def draw_headline(run: RecordedRun) -> Any:
    """Return the function that draws the main picture in a theme."""
    # Besides the main metric, show pass@K with the largest K: it says if any sample is correct.
    prefix = f"{(run.metric or 'val/').rpartition('/')[0]}/pass@"
    passes = [name for name in run.held_out if name.startswith(prefix) and name not in (run.metric, f"{prefix}1")]
    if run.metric and run.before is not None and run.after is not None:
        title = f"Held-out {short_name(run.metric)}: {run.before:.2f} → {run.after:.2f}"
        title += f" at step {run.validated_at}" if run.validated_at else ""
    else:
        title = "Held-out accuracy and training reward"
    return partial(plots.draw_headline, run.curves, run.metric, passes[-1:], title)


def composition(run: RecordedRun) -> dict[str, str]:
    """Return the name of each stage's component as on the command line. Stages that the config does not have are omitted."""
    named = {stage: _component_name(run.config.get(stage)) for stage in ("policy", "shaper", "loss", "aggregation")}
    terms = [term.removeprefix("reward/") for term in reward_terms(run.curves)]
    named["reward"] = " + ".join(terms or sorted(set(_target_names(run.config.get("reward")))))
    return {stage: name for stage, name in named.items() if name}


def _component_name(component: object) -> str:
    """Return a policy's path or hub name, otherwise the class in snake_case, which is the option on the command line."""
    if isinstance(component, str):
        return component
    if not isinstance(component, dict):
        return ""
    for key in ("path", "name", "model", "pretrained_model_name_or_path"):
        if isinstance(component.get(key), str):
            path = component[key]
            return Path(path).name if path.startswith(("/", ".", "~")) else path
    return next(iter(_target_names(component)), "")


def _target_names(component: object) -> list[str]:
    """Return the class names in a config node. A component that holds others (a weighted sum) is named by them."""
    if not isinstance(component, dict):
        return []
    values = [item for value in component.values() for item in (value if isinstance(value, list) else [value])]
    inner = [target for value in values for target in _target_names(value)]
    if inner or not isinstance(component.get("_target_"), str):
        return inner
    return [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", component["_target_"].rsplit(".", 1)[-1]).lower()]
