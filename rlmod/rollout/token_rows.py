"""Token ids of many prompts in one flat array."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from jaxtyping import Int

SCAN = 1 << 24
"""Tokens that a pass over all of them reads before it drops their pages from memory."""


@dataclass(frozen=True, eq=False)
class TokenRows(Sequence[tuple[int, ...]]):
    """Rows of token ids, without padding, that are read from one int32 array. A row is a tuple, as in a sequence of tuples."""

    flat: np.ndarray
    starts: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]
    stored: object = field(default=None, repr=False)
    """The mapped file of ``flat``, if it is one."""
    known_highest: int | None = None

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> "TokenRows":
        """Copy rows of token ids."""
        if isinstance(rows, TokenRows):
            return rows
        listed = list(rows)
        lengths = np.fromiter(map(len, listed), np.int64, len(listed))
        return cls.from_flat(flatten(listed), lengths)

    @classmethod
    def from_flat(
        cls, flat: np.ndarray, lengths: np.ndarray, stored: object = None, known_highest: int | None = None
    ) -> "TokenRows":
        """Build rows that follow one another in ``flat``."""
        lengths = lengths.astype(np.int64)
        return cls(flat, np.cumsum(lengths) - lengths, lengths, stored, known_highest)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenRows": ...
    def __getitem__(self, index: int | slice) -> "tuple[int, ...] | TokenRows":
        return self.select(index) if isinstance(index, slice) else tuple(self.array(index).tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def array(self, index: int) -> np.ndarray:
        """Return one row, without a copy."""
        start = self.starts[index]
        return self.flat[start : start + self.lengths[index]]

    def select(self, indices: Sequence[int] | np.ndarray | slice) -> "TokenRows":
        """Return some rows, without a copy of their tokens."""
        chosen = indices if isinstance(indices, slice) else np.asarray(indices, dtype=np.int64)
        return TokenRows(self.flat, self.starts[chosen], self.lengths[chosen], self.stored, self.known_highest)

    def tails(self, length: int) -> list[list[int]]:
        """Return the last ``length`` tokens of each row, or all of a shorter one."""
        return [self.array(index)[-length:].tolist() for index in range(len(self))]

    def end_alike(self, ending: np.ndarray) -> np.ndarray:
        """Return True for each row that ends with these tokens."""
        alike, size = self.lengths >= len(ending), len(ending)
        ends = self.starts + self.lengths
        for rows in self.parts():
            long = np.flatnonzero(alike[rows]) + rows.start
            tokens = self.flat[ends[long, None] - np.arange(size, 0, -1)]
            alike[long] = (tokens == ending).all(axis=1)
        return alike

    def parts(self) -> Iterator[slice]:
        """Yield the rows in parts of about SCAN tokens, whose pages are dropped from memory after each."""
        bounds = np.searchsorted(np.cumsum(self.lengths), np.arange(0, int(self.lengths.sum()) + SCAN, SCAN), "right")
        bounds[-1:] = len(self)
        for start, stop in itertools.pairwise(bounds.tolist()):
            yield slice(start, stop)
            self.forget()

    def forget(self) -> None:
        """Drop the pages of a mapped file from memory."""
        if (forget := getattr(self.stored, "forget", None)) is not None:
            forget()

    @functools.cached_property
    def highest(self) -> int:
        """The highest token id, or a bound: rows that were left out may count. -1 without any."""
        if self.known_highest is not None:
            return self.known_highest
        blocks = range(0, len(self.flat), SCAN)
        return max((int(self.flat[start : start + SCAN].max()) for start in blocks), default=-1)


def flatten(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the tokens of all rows, one row after the other."""
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, sum(map(len, rows)))
