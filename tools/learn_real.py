"""Trains a real pretrained policy on sums, over seeds, and writes what came out: docs/real_model.md and its picture.

``make learn-real`` (nine runs of 10 to 30 minutes of CPU, one per core at a time; finished runs are kept, unfinished ones resume)

Three of them are controls: rewards that pay for the format alone, and a task on which the format is all that is learned.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmod.commands.report.runs import RecordedRun, Sample, read_run

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
NUMBER = r"^\s*(\d+)"
"""A completion's answer on every task here: the number that it begins with."""


@dataclass(frozen=True)
class Run:
    """One training run: experiment=real with some overrides."""

    arm: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


def runs(folder: Path) -> list[Run]:
    """Return all runs, in the order in which they start."""
    sums = [
        Run(arm, seed, (f"shaper={shaper}",))
        for seed in SEEDS
        for arm, shaper in (("gtpo", "token_entropy"), ("grpo", "uniform"))
    ]
    larger = (
        "data=problem_file", f"data.path={folder / 'larger_train.jsonl'}", f"data.validation_path={folder / 'larger_test.jsonl'}",
        "data.encoder.chat=false", "shaper=uniform",
    )  # fmt: skip
    graded = "validation.reward={_target_:rlmod.reward.exact_match.ExactMatch,pattern:'^\\s*(\\d+)'}"
    any_number, three_digits = (
        ("reward=format", f"reward.pattern='{pattern}'", graded) for pattern in (r"\s*\d.*", r"\s*\d{3}(\D.*)?")
    )
    return [
        *sums,
        Run("larger", 0, larger),
        Run("larger_format", 0, (*larger, "filter=keep_all", *three_digits)),  # the format is soon learned by all
        Run("sums_format", 0, ("shaper=uniform", "filter=keep_all", *any_number)),
    ]


def write_larger(folder: Path) -> None:
    """Write the problems "which number is larger", 600 to train on and 167 held out, without a pair in both."""
    rng = random.Random(0)
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < 767:
        a, b = rng.sample(range(100, 1000), 2)
        if (b, a) not in pairs:
            pairs.add((a, b))
    rows = [
        {"prompt": f"Question: Which number is larger, {a} or {b}?\nAnswer:", "answer": str(max(a, b))}
        for a, b in sorted(pairs, key=lambda pair: rng.random())
    ]
    for name, part in (("train", rows[167:]), ("test", rows[:167])):
        (folder / f"larger_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def train(run: Run, folder: Path) -> None:
    """Train, unless that was done before, and keep the CPU time and the peak of the memory beside the run."""
    output = folder / run.name
    result, spent = output / "result.json", output / "cpu_seconds.json"
    if not (result.is_file() and json.loads(result.read_text())["completed"]):
        command = [
            str(Path(sys.executable).with_name("rlmod-train")), "experiment=real", f"output={output}", f"seed={run.seed}",
            "callbacks.checkpoints.keep=1", "callbacks.checkpoints.best=false",  # 2 GB each
            *run.overrides,
        ]  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with (output / "console.txt").open("a") as console:
            process = subprocess.Popen(
                command, stdout=console, stderr=console, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status
        earlier = json.loads(spent.read_text())["cpu"] if spent.is_file() else 0.0
        record = {"cpu": earlier + usage.ru_utime + usage.ru_stime, "peak_gib": usage.ru_maxrss / 2**20}
        spent.write_text(json.dumps(record))
        if status:
            raise SystemExit(f"{run.name} failed; see {output / 'console.txt'}")
        print(f"{run.name}: {time.perf_counter() - began:.0f} s", flush=True)


@dataclass(frozen=True)
class Finished:
    """A complete run, read from its folder."""

    run: Run
    recorded: RecordedRun
    cpu_minutes: float
    peak_gib: float

    @property
    def held_out(self) -> dict[str, Any]:
        return dict(self.recorded.result["held_out"])

    @property
    def accuracies(self) -> list[tuple[float, float]]:
        """Held-out mean@4 by the number of iterations done: that of step N is measured after iteration N + 1, the first before any."""
        return [(step and step + 1, value) for step, value in sorted(self.recorded.curves["val/mean@4"].items())]

    def samples(self, last: bool) -> list[Sample]:
        """Return the recorded completions of the first or the last validation."""
        validated = [sample for sample in self.recorded.samples if sample.when == "validation"]
        step = (max if last else min)(sample.step for sample in validated)
        return [sample for sample in validated if sample.step == step]

    def formatted(self, last: bool) -> float:
        """Return the share of the recorded completions that begin with a number."""
        samples = self.samples(last)
        return sum(re.match(NUMBER, sample.completion) is not None for sample in samples) / len(samples)


def finished(run: Run, folder: Path) -> Finished | None:
    output = folder / run.name
    if not (output / "cpu_seconds.json").is_file():
        return None
    recorded, spent = read_run(output), json.loads((output / "cpu_seconds.json").read_text())
    if not recorded.result.get("completed"):
        return None
    return Finished(run, recorded, spent["cpu"] / 60, spent["peak_gib"])


def table(done: list[Finished]) -> str:
    """Return the rows of the page's first table."""
    rows = []
    for each in done:
        held_out, intervals = each.held_out, each.held_out["intervals"]
        cells = [
            f"{held_out[when]:.3f} ({intervals[when][0]:.3f} to {intervals[when][1]:.3f})"
            for when in ("before", "after")
        ]
        spread = each.recorded.curves.get("shaper/spread_within")
        within = f"{statistics.median(spread.values()):.3f}" if spread else ""
        rows.append(
            f"| `{each.run.arm}` | {each.run.seed} | {' | '.join(cells)} | {each.formatted(False):.2f} -> {each.formatted(True):.2f} | "
            f"{within} | {each.cpu_minutes:.0f} | {each.peak_gib:.1f} |"
        )
    return "\n".join(rows)


def samples_table(done: Finished, rows: int = 8) -> str:
    """Return completions of the same problems before and after training."""
    later = {sample.prompt: sample for sample in done.samples(True)}
    lines = []
    for before in done.samples(False)[:rows]:
        after = later[before.prompt]
        texts = [json.dumps(sample.completion)[1:-1] for sample in (before, after)]
        lines.append(f"| `{before.prompt.splitlines()[-1]}` | {before.answer} | `{texts[0]}` | `{texts[1]}` |")
    return "\n".join(lines)


def picture(done: list[Finished], path: Path) -> None:
    """Draw held-out accuracy over the iterations: the two algorithms at the left, the controls at the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    styles = {
        "gtpo": (0, "C0", "GTPO"),
        "grpo": (0, "C1", "GRPO"),
        "sums_format": (0, "grey", "reward for any number"),
        "larger": (1, "C1", "GRPO"),
        "larger_format": (1, "grey", "reward for any number of three digits"),
    }
    for each in done:
        place, color, label = styles[each.run.arm]
        seen = {line.get_label() for line in axes[place].get_lines()}
        x, y = zip(*each.accuracies, strict=True)
        axes[place].plot(x, y, color=color, marker="o", markersize=3, label=None if label in seen else label)
    for place, title in ((0, "sums and differences of 1 to 20"), (1, "which number is larger?")):
        axes[place].set_title(title)
        axes[place].set_xlabel("iterations of 8 prompts x 8 completions")
        axes[place].grid(alpha=0.3)
        if axes[place].get_lines():
            axes[place].legend(loc="lower right")
    axes[0].set_ylabel("held-out mean@4 (temperature 1)")
    axes[0].set_ylim(0, 1)
    figure.savefig(path, dpi=130)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--folder", type=Path, default=Path("runs/real"), help="where the runs go; finished ones are kept"
    )
    arguments.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time, one thread each"
    )
    arguments.add_argument("--arms", nargs="*", help="only these arms; default: all")
    arguments.add_argument("--finished", action="store_true", help="run nothing: write the page of what has been run")
    options = arguments.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_larger(options.folder)
    chosen = runs(options.folder.absolute())
    if not options.finished:
        with ThreadPoolExecutor(options.jobs) as pool:
            wanted = [run for run in chosen if options.arms is None or run.arm in options.arms]
            for _ in pool.map(lambda run: train(run, options.folder), wanted):
                pass
    done = [found for run in chosen if (found := finished(run, options.folder)) is not None]
    rows = table(done)
    print(rows)
    missing = [run.name for run in chosen if run.name not in {each.run.name for each in done}]
    if missing and not (options.finished and done):
        print(f"{len(done)} of {len(chosen)} runs are finished; the page is written once all are")
        return
    picture(done, ROOT / "docs" / "real_model.png")
    text = PAGE.format(
        rows=rows,
        samples=samples_table(done[0]),
        problems=done[0].held_out["problems"],
        validations=len(done[0].accuracies),
        reading=(f"**Not complete yet.** Missing: {', '.join(missing)}.\n\n" if missing else "") + READING,
    )
    (ROOT / "docs" / "real_model.md").write_text(text, encoding="utf-8")


PAGE = """# A real policy on a CPU

SmolLM2-135M-Instruct (135 M parameters, Apache-2.0) learns to add and subtract, on one CPU core:

    make real-policy                                          # once: fetches it and converts it (a minute)
    .venv/bin/rlmod-train experiment=real                     # GTPO
    .venv/bin/rlmod-train experiment=real shaper=uniform      # GRPO: one factor changes, the shaper

`make learn-real` does the runs of this page, one per core at a time, and writes it. Set `OMP_NUM_THREADS=1` when you start several by
yourself.

**The task** is `data=sums`: all sums and differences of two numbers from 1 to 20, behind two worked examples.

    3 + 5 = 8
    12 - 4 = 8
    17 + 20 =

The policy continues with at most four tokens, and a line end stops it. The number that the completion begins with is its answer. {problems}
problems are held out. No pair of numbers is in both sets, in either order.

**The settings**: 30 iterations of 8 prompts x 8 completions, one optimizer step each, AdamW with learning rate 2e-5, float32, dynamic
sampling, token-mean aggregation, clip 0.2 and 0.28. GTPO is `shaper=token_entropy`, without bounds on the entropy; GRPO is
`shaper=uniform`.
Validation samples four completions of each held-out problem at temperature 1.

## Results

| run | seed | mean@4 before | after (95 % interval) | begin with a number | spread within | CPU minutes | GiB |
|---|---|---|---|---|---|---|---|
{rows}

![held-out accuracy over the iterations](real_model.png)

"Begin with a number" is the share of the recorded completions (64 of each validation) before and after training. "Spread within" is the
median of `shaper/spread_within`, the standard deviation of the advantages over the tokens of a completion. Between completions it is 1.
CPU minutes and GiB (the peak) are of the whole process, with loading and {validations} validations.

{reading}
## Before and after

GTPO, seed 0. A completion is drawn at temperature 1, so a single one says little.

| problem | answer | before | after |
|---|---|---|---|
{samples}

## On a GPU, with GSM8K

    rlmod-train experiment=gtpo_unclipped size=gsm8k policy=smollm2 data.path=train.jsonl data.validation_path=test.jsonl

`train.jsonl` and `test.jsonl` are GSM8K's own files, with `question` and `answer`. `size=gsm8k` has chat prompts, up to 1,024 tokens per
completion, G = 8, 64 prompts and learning rate 1e-6. `rlmod-plan` with the same words estimates 38 GiB on one H100. This has not been
run. A policy of 135 M parameters solves few of these problems; for a curve that rises take one of 0.5 B or more.
"""

READING = """**What this shows.** The policy learns to calculate, and not only a form: its completions begin with a number before
training too. GTPO and GRPO cannot differ much here. A completion has three or four tokens, and over these GTPO's advantages vary by less
than a hundredth of what they vary between completions. To compare the two, take a task with long completions.

**What format alone does.** `larger` asks `Question: Which number is larger, 328 or 301?`. In `larger_format` the reward is paid for any
number of three digits at the beginning, correct or not. Held-out accuracy rises all the same, up to the level of guessing: before training
most completions are not a number at all. That gain is format alone.

"""

if __name__ == "__main__":
    main()
