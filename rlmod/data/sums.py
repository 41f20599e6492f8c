"""Sums and differences of two numbers behind worked examples: a task for a pretrained policy, without a download."""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

from rlmod.types import Problem

HELD_OUT_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Problems such as ``3 + 5 = 8\\n12 - 4 = 8\\n17 + 20 =``, with all pairs of numbers from 1 to ``largest``; the answer is ``37``.

    The examples show the form, so that a policy that has read such lines before answers in it. Differences below 0 are left out.

    A hash of each pair of numbers decides its split; a quarter is held out. So no pair is in both splits, in either order.
    """

    split: Literal["train", "held_out"]
    largest: int = 20
    examples: str = "3 + 5 = 8\n12 - 4 = 8\n"
    """Text before each problem."""

    def __post_init__(self) -> None:
        if self.split not in ("train", "held_out"):
            raise ValueError(f"data.*.split must be train or held_out, got {self.split!r}")
        if not 4 <= self.largest <= 1000:
            raise ValueError(f"data.*.largest must be from 4 to 1000, got {self.largest}")

    def __call__(self) -> list[Problem]:
        numbers = range(1, self.largest + 1)
        pairs = [(a, b) for a in numbers for b in numbers if is_held_out(a, b) == (self.split == "held_out")]
        texts = [(f"{a} + {b}", a + b) for a, b in pairs] + [(f"{a} - {b}", a - b) for a, b in pairs if a >= b]
        random.Random(self.split).shuffle(texts)  # so that data.limit takes problems of all sizes
        return [
            Problem(prompt=f"{self.examples}{text} =", answer=str(answer), source=f"sums:{text}")
            for text, answer in texts
        ]


def is_held_out(a: int, b: int) -> bool:
    return hashlib.sha256(f"{min(a, b)},{max(a, b)}".encode()).digest()[0] < 256 * HELD_OUT_SHARE
