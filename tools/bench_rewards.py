"""The worker pool of rewards: two workers against one, and what completions that fail cost.

``python tools/bench_rewards.py PROBLEMS.jsonl`` prints two tables. The file has one problem per line, with the field ``answer``.

1. Wall-clock time of grading 5,000 completions with ``math_verify``, one worker and two in turn. A third of the completions is correct,
   a third is another number, and a third spells the answer as a formula.
2. A reward that hangs on 1 % of 5,000 completions, raises on 1 %, returns NaN on 1 % and ends its process on 0.1 %. The bound is what
   the same completions cost without failures, and the time limits of those that hang, shared by the workers.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from rlmod.reward._compute import compute_rewards
from rlmod.reward._failures import RewardResult
from rlmod.reward._math_text import gold_text
from rlmod.reward._supervised import Supervised
from rlmod.reward.math_verify import MathVerify
from rlmod.types import Texts

ROOT = Path(__file__).parents[1]
COMPLETIONS = 5000
SPELLINGS = ("The answer is \\boxed{{{0}}}.", "So we get {0}1.", "Hence $x = \\frac{{2 \\cdot {0}}}{{2}}$.")
TIME_LIMIT = 2.0
"""Seconds per completion in the second table."""


def read_answers(file: Path) -> list[str]:
    """Return 5,000 answers of the file, from its beginning again if it has fewer."""
    answers = [gold_text(str(json.loads(line)["answer"])) for line in file.read_text(encoding="utf-8").splitlines()]
    return [answers[i % len(answers)] for i in range(COMPLETIONS)]


def timed(reward: MathVerify | Supervised, texts: Texts) -> tuple[float, RewardResult]:
    started = time.perf_counter()
    result = compute_rewards(reward, texts)
    return time.perf_counter() - started, result


def compare_workers(answers: Sequence[str], pairs: int) -> None:
    completions = [SPELLINGS[i % len(SPELLINGS)].format(answer) for i, answer in enumerate(answers)]
    texts = Texts(completions=completions, answers=answers)
    rewards = {workers: MathVerify(workers=workers) for workers in (1, 2)}
    few = Texts(completions=completions[:100], answers=answers[:100])
    for reward in rewards.values():
        compute_rewards(reward, few)  # starts the workers
    seconds: dict[int, list[float]] = {1: [], 2: []}
    verdicts: list[list[float]] = []
    for _ in range(pairs):
        for workers, reward in rewards.items():
            took, result = timed(reward, texts)
            seconds[workers].append(took)
            verdicts.append(result.rewards.tolist())
    assert all(each == verdicts[0] for each in verdicts), "the verdicts depend on the number of workers"
    ratios = [two / one for one, two in zip(seconds[1], seconds[2], strict=True)]
    print(f"{COMPLETIONS} completions, {pairs} pairs, {sum(verdicts[0]):.0f} correct | median s | lowest | highest")
    for workers, values in seconds.items():
        print(f"{workers} workers | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f}")
    print(f"two / one | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f}")


def measure_failures(workers: int) -> None:
    """Print the time with and without failures, and check their counts and the order of the rewards."""
    sys.path.insert(0, str(ROOT))
    from tests.reward import faulty

    plain = [str(i) for i in range(COMPLETIONS)]
    kinds = {17: "hang", 41: "raise", 73: "nan"}
    planted = {i: kinds[i % 100] for i in range(COMPLETIONS) if i % 100 in kinds}
    planted |= {i: "exit" for i in range(99, COMPLETIONS, 1000)}
    failing = [planted.get(i, text) for i, text in enumerate(plain)]
    answers = [""] * COMPLETIONS
    reward = Supervised(supervised=faulty.by_text, workers=workers, on_error="zero", timeout_seconds=TIME_LIMIT)
    compute_rewards(reward, Texts(completions=plain[:10], answers=answers[:10]))
    without, _ = timed(reward, Texts(completions=plain, answers=answers))
    with_failures, result = timed(reward, Texts(completions=failing, answers=answers))
    expected = [0.0 if i in planted else float(i) for i in range(COMPLETIONS)]
    failed = result.failed[""]
    hanging = sum(kind == "hang" for kind in planted.values())
    assert result.rewards.tolist() == expected, "a reward is in the wrong place"
    assert int(failed.timeouts.sum()) == hanging
    assert int(failed.errors.sum()) == len(planted) - hanging
    clocks = hanging * TIME_LIMIT / workers
    print(
        f"\n{COMPLETIONS} completions, {workers} workers, {len(planted)} fail, {hanging} of them by hanging | seconds"
    )
    print(f"without failures | {without:.1f}")
    print(f"time limits of those that hang, {hanging} x {TIME_LIMIT:g} s / {workers} | {clocks:.1f}")
    print(f"with failures | {with_failures:.1f}, {with_failures / (without + clocks):.3f} of the sum")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("problems", type=Path)
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--workers", type=int, default=2, help="of the second table")
    arguments = options.parse_args()
    warnings.simplefilter("ignore")
    compare_workers(read_answers(arguments.problems), arguments.pairs)
    measure_failures(arguments.workers)


if __name__ == "__main__":
    main()
