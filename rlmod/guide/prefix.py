"""A guide that helps with the prompt: on problems that the policy fails on, the prompt holds the beginning of a known solution.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from rlmod import jsonl
from rlmod.guide._fields import parse_prompt, prompt_key, shorten
from rlmod.types import Problem, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@runtime_checkable
class Encoder(Protocol):
    """An encoder of problems, as rlmod/rollout/prompts.py has it."""

    def encode(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The prompt of a failed problem, with the first ``lengths[k]`` of a known solution's tokens in it; the policy completes it itself.

    The zero-reward batch tries the lengths from the shortest on, and trains on the first whose completions hold a correct one. The guided
    prompt is a group of its own. Its completions are on-policy: the ratio is pi_theta / pi_old on the guided prompt, and no loss falls on
    the prefix.

    Source: [R] POPE, arXiv:2601.18779, from two summaries of it; its full text was not at hand.
    Differs: [D] the lengths are 1/4, 1/2 and 3/4 of the solution. [D] A problem that no length solves stays dropped: its group would have
    no advantage. [D] At most as many guided prompts as ``zero_reward.prompts``, by default one for each plain one.
    Degenerate: if the policy solves every prompt, or no failed problem has a solution, nothing changes.
    """

    encoder: Encoder
    """The encoder of the data, so that the guided prompt goes through the same chat template."""
    path: str | None = None
    """A JSONL file with ``prompt`` (the same as in the problems) and ``completion`` (the solution), as guide=demonstrations reads it."""
    field: str | None = None
    """In place of ``path``: the column of the data that holds the solution; a dotted name goes into objects."""
    lengths: Sequence[float] = (0.25, 0.5, 0.75)
    """Shares of the solution's tokens, rising."""
    template: str = "{prompt}\n\nA correct solution begins like this:\n\n{prefix}\n\nContinue it from there, up to the final answer.\n"
    """The guided prompt; of a chat, the last message of the user."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.field is None):
            raise ValueError(
                "guide.path or guide.field: give the one of them that holds the solutions, and leave the other null"
            )
        if self.path is not None and not Path(self.path).is_file():
            raise ValueError(f"guide.path={self.path}: there is no such file; relative paths start at {Path.cwd()}")
        for share in self.lengths:
            if not 0 < share < 1:
                raise ValueError(
                    f"guide.lengths={list(self.lengths)}: {share} is no share of the solution above 0 and below 1"
                    + ("; a prefix cannot be longer than the solution" if share >= 1 else "")
                )
        if not self.lengths or sorted(set(self.lengths)) != list(self.lengths):
            raise ValueError(
                f"guide.lengths={list(self.lengths)} must be at least one share, each above the one before it"
            )
        for name in ("prompt", "prefix"):
            if self.template.count(f"{{{name}}}") != 1:
                raise ValueError(f"guide.template must contain {{{name}}} once, got {self.template!r}")

    @property
    def completions_per_prompt(self) -> int:
        """0: only the zero-reward batch uses this guide."""
        return 0

    @property
    def attempts(self) -> int:
        """Number of guided prompts that each problem may get."""
        return len(self.lengths)

    @cached_property
    def solutions(self) -> dict[str, tuple[str, str]]:
        """The solution, and its place for error messages, by prompt; filled by ``prepare`` from ``path``."""
        return {}

    @cached_property
    def tokenizer(self) -> "list[PreTrainedTokenizerBase]":
        """The policy's tokenizer, once ``prepare`` has been called."""
        return []

    def prepare(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None:
        """Read the solutions. ValueError, with the line or the problem, for one of a single token; counts problems without one."""
        self.tokenizer[:] = [tokenizer]
        if self.path is not None:
            for where, record in jsonl.read_objects(Path(self.path)):
                text = record.get("completion")
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"{where}: completion must be the text of a solution, got {text!r}")
                self.solutions.setdefault(parse_prompt(record, where), (text, where))
        missing = 0
        for problem in problems:
            if (found := self._solution(problem)) is None:
                missing += 1
            elif len(self._tokens(found[0])) < 2:
                raise ValueError(
                    f"{found[1]}: the solution {shorten(found[0])} is a single token, and the prefix must be shorter than the solution"
                )
        key = f"guide.path={self.path}" if self.path is not None else f"guide.field={self.field}"
        if missing == len(problems):
            raise ValueError(f"{key} holds no solution for any of the {missing} problems of data.train")
        if missing:
            log.warning(
                "%s holds no solution for %d of %d problems: they get no guided prompt", key, missing, len(problems)
            )

    def can_guide(self, problem: Problem) -> bool:
        return self._solution(problem) is not None

    def guided_prompts(self, prompts: Prompts, attempt: int) -> Prompts:
        """Return the guided prompt of each of these problems, with the ``attempt``-th length."""
        guided = [self._guided(problem, self.lengths[attempt]) for problem in prompts.problems]
        encoded = replace(cast(Any, self.encoder), max_tokens=None).encode(guided, self.tokenizer[0])
        return encoded.batch(range(len(guided))).to(prompts.ids.device)

    def _guided(self, problem: Problem, share: float) -> Problem:
        found = self._solution(problem)
        assert found is not None
        tokens = self._tokens(found[0])
        number = min(max(math.floor(share * len(tokens)), 1), len(tokens) - 1)
        # A token may end in the middle of a character, which decodes to U+FFFD.
        prefix = cast(str, self.tokenizer[0].decode(tokens[:number])).rstrip("\ufffd") or found[0][:1]
        if isinstance(problem.prompt, str):
            return replace(problem, prompt=self._fill(problem.prompt, prefix))
        *before, last = problem.prompt
        return replace(problem, prompt=(*before, {**last, "content": self._fill(last["content"], prefix)}))

    def _fill(self, prompt: str, prefix: str) -> str:
        # Not str.format: prompts and solutions hold braces.
        before, after = self.template.split("{prompt}", 1)
        return before.replace("{prefix}", prefix) + prompt + after.replace("{prefix}", prefix)

    def _tokens(self, solution: str) -> list[int]:
        return cast(list[int], self.tokenizer[0].encode(solution, add_special_tokens=False))

    def _solution(self, problem: Problem) -> tuple[str, str] | None:
        """Return the solution of a problem and its place, or None."""
        if self.field is None:
            return self.solutions.get(prompt_key(problem))
        value: Any = problem.extra
        for part in self.field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not isinstance(value, str):
            raise ValueError(f"{problem.source}: guide.field={self.field} must be text, got {type(value).__name__}")
        return value, problem.source
