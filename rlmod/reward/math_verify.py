"""Mathematical correctness, by math-verify in a process that can be killed."""

import atexit
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import ClassVar

from rlmod.types import Problem, Texts

START_SECONDS = 120.0
"""For importing SymPy, on a busy machine with a slow disk."""


@dataclass(frozen=True, kw_only=True)
class MathVerify:
    r"""reward_i = 1 if the final answer of completion_i equals answer_i as mathematics, else 0

    What is read of a completion: its last ``\boxed{...}``; else its last line that ends with ``#### number``; else the
    last number or formula in it (formulas as $...$, \(...\), \[...\]). ``1,234``, ``$5``, ``-$5``, ``5.0`` and ``50%``
    (equal to 50 and to 0.5) are numbers. The answer is read alike, and may also be bare LaTeX: ``\frac{3}{4}``.

    Parsed by math-verify 0.9 with LaTeX (boxed_match_priority 0) and plain expressions, fallback_mode "no_fallback", so
    that two texts which are no mathematics are never compared as strings. Its own time-outs are off: they are signals,
    which work in the main thread only and cannot interrupt SymPy inside a C routine. Instead each row has
    ``timeout_seconds`` by the wall clock in a worker process, which is killed when they are over; the next row gets a
    new one.

    Source: math-verify, https://github.com/huggingface/Math-Verify.
    Differs: math-verify alone takes what follows the word "answer" before the last number, and reads expressions over
    line ends.
    Degenerate: a completion without a readable answer is wrong. Rows that time out or fail score 0 too, with a warning
    that counts them. An answer that cannot be read is an error,
    found when the problems are read: nothing could ever match it.
    Reads: completions, answers.
    """

    pointwise: ClassVar[bool] = True
    timeout_seconds: float = 5.0
    """Seconds per completion, by the wall clock."""

    def __post_init__(self) -> None:
        if self.timeout_seconds <= 0 or not isfinite(self.timeout_seconds):
            raise ValueError(f"reward.timeout_seconds must be above 0 and finite, got {self.timeout_seconds}")
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward: MathVerify needs the package math-verify: pip install 'math-verify[antlr4_9_3]'")

    def prepare(self, problems: Sequence[Problem], tokenizer: object) -> None:
        """ValueError for the first answer that cannot be read, before anything is sampled."""
        with _one_at_a_time:
            for answer, problem in {problem.answer: problem for problem in reversed(problems)}.items():
                verdict, detail = _graded("", answer, self.timeout_seconds)
                if verdict in ("gold", "timeout"):
                    raise _unreadable(answer, problem, detail or verdict.replace("gold", ""))

    def __call__(self, texts: Texts) -> list[float]:
        verdicts = []
        with _one_at_a_time:
            for row, (completion, answer) in enumerate(zip(texts.completions, texts.answers, strict=True)):
                verdict, detail = _graded(completion, answer, self.timeout_seconds)
                if verdict == "gold":
                    raise _unreadable(answer, texts.problems[row] if texts.problems else None, detail)
                verdicts.append((verdict, detail))
        self._warn(texts, verdicts)
        return [float(verdict == "right") for verdict, _ in verdicts]

    def _warn(self, texts: Texts, verdicts: list[tuple[str, str]]) -> None:
        timeouts = [row for row, (verdict, _) in enumerate(verdicts) if verdict == "timeout"]
        errors = [row for row, (verdict, _) in enumerate(verdicts) if verdict == "error"]
        for rows, what in ((timeouts, f"took longer than {self.timeout_seconds} s"), (errors, "failed")):
            if rows:
                reason = f" ({verdicts[rows[0]][1]})" if verdicts[rows[0]][1] else ""
                warnings.warn(
                    f"MathVerify: {len(rows)} of {len(verdicts)} rows {what} and score 0. The first is row "
                    f"{rows[0]}{reason}, whose completion ends {texts.completions[rows[0]][-200:]!r}",
                    stacklevel=3,
                )


def _unreadable(answer: str, problem: Problem | None, detail: str) -> ValueError:
    where = f" ({problem.source})" if problem else ""
    return ValueError(f"MathVerify cannot parse the answer {answer!r}{where} {detail}".rstrip())


class _Worker:
    """A running _worker.py and the connection to it.

    A program of its own and not a ``multiprocessing.Process``: spawning one of those imports the main module again,
    which for a training run is torch, Lightning and transformers; forking one copies CUDA's state and threads' locks.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.connection, theirs = multiprocessing.Pipe()
        # -P: the script's folder stays off sys.path, where this very file would hide the library of its name.
        # A session of its own: Ctrl-C reaches the trainer only, which ends the worker.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("_worker.py")), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def wait_until_ready(self) -> None:
        try:
            if not self.connection.poll(START_SECONDS):
                raise RuntimeError(f"MathVerify's worker did not start within {START_SECONDS:.0f} s")
            self.connection.recv()
        except EOFError:
            raise RuntimeError("MathVerify's worker ended while starting; its error stands above") from None

    def kill(self) -> int:
        """Ends it, leaves no zombie, and returns its exit status."""
        self.process.kill()
        self.connection.close()
        return self.process.wait()


_one_at_a_time = threading.Lock()
_worker: _Worker | None = None
"""The worker of this process, started at the first row. It is here because a component holds no state."""


def _graded(completion: str, answer: str, seconds: float) -> tuple[str, str]:
    """The worker's verdict, or ``timeout``. Whatever happens, a worker that still owes an answer is killed."""
    global _worker
    if _worker is not None and _worker.owner != os.getpid():
        _worker = None  # inherited by a fork: the parent's, not ours to talk to or to kill
    reply = None
    try:
        if _worker is None:
            _worker = _Worker()
            _worker.wait_until_ready()
        try:
            _worker.connection.send((completion, answer, seconds))
            if not _worker.connection.poll(seconds):
                return "timeout", ""
            reply = _worker.connection.recv()
            return reply
        except (EOFError, OSError):
            return "error", f"the worker died with exit status {_worker.process.wait()}"
    finally:
        if reply is None:
            _stop()


@atexit.register
def _stop() -> None:
    global _worker
    if _worker is not None and _worker.owner == os.getpid():
        _worker.kill()
    _worker = None
