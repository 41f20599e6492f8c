"""Chains of small numbers modulo m, with worked solutions: the embedded task that needs no download."""

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Literal

from rlmod.types import Problem

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Problems such as ``3+5*2:``, evaluated from left to right, every step modulo ``modulus``; the answer is ``6``.

    A worked solution writes each step, ``3+5=8,8*2=6#6``; a direct one only the answer, ``#6``.

    The train and held-out splits are disjoint for all sizes and seeds: a hash of the problem's text decides the split (a tenth is held
    out). No problem appears twice in a split.
    """

    split: Literal["train", "held_out"]
    size: int
    min_numbers: int = 4
    max_numbers: int = 6
    operations: str = "+-*"
    modulus: int = 10
    """Numbers and results lie in [0, modulus)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("train", "held_out"):
            raise ValueError(f"data.*.split must be train or held_out, got {self.split!r}")
        if self.size < 1:
            raise ValueError(f"data.*.size must be at least 1, got {self.size}")
        if not 2 <= self.min_numbers <= self.max_numbers:
            raise ValueError(
                "data.*.min_numbers must be at least 2 and at most data.*.max_numbers, "
                f"got {self.min_numbers} and {self.max_numbers}"
            )
        if self.modulus < 2:
            raise ValueError(f"data.*.modulus must be at least 2, got {self.modulus}")
        if not self.operations or set(self.operations) - set(OPERATIONS):
            raise ValueError(f"data.*.operations must contain only {''.join(OPERATIONS)}, got {self.operations!r}")
        distinct = sum(
            self.modulus**n * len(set(self.operations)) ** (n - 1)
            for n in range(self.min_numbers, self.max_numbers + 1)
        )
        share = HELD_OUT_SHARE if self.split == "held_out" else 1 - HELD_OUT_SHARE
        if self.size > distinct * share / 2:
            raise ValueError(
                f"data.*.size is {self.size}, but only about {int(distinct * share)} {self.split} problems of "
                f"{self.min_numbers} to {self.max_numbers} numbers exist; at most half of them can be drawn: "
                "lower data.*.size, or raise data.*.max_numbers or data.*.modulus"
            )

    def __call__(self) -> list[Problem]:
        rng = random.Random(f"{self.split}-{self.seed}")
        problems: dict[str, Problem] = {}
        while len(problems) < self.size:
            n = rng.randint(self.min_numbers, self.max_numbers)
            numbers = [rng.randrange(self.modulus) for _ in range(n)]
            operations = [rng.choice(self.operations) for _ in range(n - 1)]
            text = str(numbers[0]) + "".join(o + str(x) for o, x in zip(operations, numbers[1:], strict=True))
            if is_held_out(text) == (self.split == "held_out") and text not in problems:
                steps, answer = solve(text, self.modulus)
                extra = {"solution": ",".join(steps) + f"#{answer}"}
                problems[text] = Problem(prompt=text + ":", answer=answer, source=f"arithmetic:{text}", extra=extra)
        return list(problems.values())


def is_held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def solve(text: str, modulus: int, error_rate: float = 0.0, rng: random.Random | None = None) -> tuple[list[str], str]:
    """Return the worked steps of a chain and its result: ``3+5*2`` modulo 10 -> ``(["3+5=8", "8*2=6"], "6")``.

    With ``error_rate`` and ``rng``, the result of each step is replaced with that probability by a random one, and the next step
    continues from it: a solver that makes mistakes.
    """
    ((value, rest),) = re.findall(r"^(\d+)(.*)$", text)
    steps = []
    for operation, number in re.findall(r"([+\-*])(\d+)", rest):
        result = OPERATIONS[operation](int(value), int(number)) % modulus
        if rng is not None and rng.random() < error_rate:
            result = rng.randrange(modulus)
        steps.append(f"{value}{operation}{number}={result}")
        value = str(result)
    return steps, value
