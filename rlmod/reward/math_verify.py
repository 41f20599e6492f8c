"""Mathematical correctness, checked by math-verify in a process that can be killed."""

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

from rlmod.types import Problem, Texts, accepted_answers

START_SECONDS = 120.0
"""Time limit for importing SymPy, long enough for a busy machine with a slow disk."""


@dataclass(frozen=True, kw_only=True)
class MathVerify:
    r"""reward_i = 1 if the final answer of completion_i equals answer_i (or one of several) as mathematics, else 0

    The final answer of a completion is its last ``\boxed{...}`` (none if that box is cut off). Without a box it is the number of its
    last line that ends with ``#### number``; else the last number or formula (formulas as $...$, \(...\), \[...\]). ``1,234``, ``$5``,
    ``-$5``, ``5.0``, ``1e-7`` and ``50%`` (equal to 50 and to 0.5) are numbers. The answer is read in the same way, and may also be bare
    LaTeX: ``\frac{3}{4}``. Two numbers are equal if six decimals agree, and below 0.001 also three significant digits.

    math-verify 0.9 parses with LaTeX (boxed_match_priority 0) and plain expressions, and with fallback_mode "no_fallback", so that two
    texts which are not mathematics are never compared as strings. Its own time-outs are off: they are signals, which work only in the
    main thread and cannot interrupt SymPy inside a C routine. Instead each completion has ``timeout_seconds`` of wall-clock time in a
    worker process. The worker is killed if it exceeds them, and the next completion gets a new one.

    Source: math-verify, https://github.com/huggingface/Math-Verify.
    Differs: math-verify alone prefers the text after the word "answer" to the last number, and reads expressions across line ends.
    Degenerate: a completion without a readable answer is incorrect. Completions that time out or fail also get reward 0, with a warning
    that counts them. A problem's answer that cannot be parsed is an error before anything is sampled: nothing could ever match it.
    Reads: completions, answers.
    """

    pointwise: ClassVar[bool] = True
    timeout_seconds: float = 5.0
    """Seconds of wall-clock time per completion."""

    def __post_init__(self) -> None:
        if self.timeout_seconds <= 0 or not isfinite(self.timeout_seconds):
            raise ValueError(f"reward.timeout_seconds must be above 0 and finite, got {self.timeout_seconds}")
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward: MathVerify needs the package math-verify: pip install 'math-verify[antlr4_9_3]'")

    def prepare(self, problems: Sequence[Problem], tokenizer: object) -> None:
        """Raise ValueError for the first answer that cannot be parsed, before anything is sampled."""
        with _lock:
            gold = {answer: problem for problem in reversed(problems) for answer in accepted_answers(problem.answer)}
            for answer, problem in gold.items():
                verdict, detail = _grade("", answer, self.timeout_seconds)
                if verdict in ("gold", "timeout"):
                    raise _unparsable_answer(answer, problem, detail or verdict.replace("gold", ""))

    def __call__(self, texts: Texts) -> list[float]:
        verdicts = []
        with _lock:
            for row, (completion, answers) in enumerate(zip(texts.completions, texts.answers, strict=True)):
                verdict, detail = "incorrect", ""
                for answer in accepted_answers(answers):
                    verdict, detail = _grade(completion, answer, self.timeout_seconds)
                    if verdict == "gold":
                        raise _unparsable_answer(answer, texts.problems[row] if texts.problems else None, detail)
                    if verdict != "incorrect":
                        break
                verdicts.append((verdict, detail))
        self._warn_of_failures(texts, verdicts)
        return [float(verdict == "correct") for verdict, _ in verdicts]

    def _warn_of_failures(self, texts: Texts, verdicts: list[tuple[str, str]]) -> None:
        timeouts = [row for row, (verdict, _) in enumerate(verdicts) if verdict == "timeout"]
        errors = [row for row, (verdict, _) in enumerate(verdicts) if verdict == "error"]
        for rows, what in ((timeouts, f"took longer than {self.timeout_seconds} s"), (errors, "failed")):
            if rows:
                reason = f" ({verdicts[rows[0]][1]})" if verdicts[rows[0]][1] else ""
                warnings.warn(
                    f"MathVerify: {len(rows)} of {len(verdicts)} completions {what} and get reward 0. The first is row "
                    f"{rows[0]}{reason}, whose completion ends {texts.completions[rows[0]][-200:]!r}",
                    stacklevel=3,
                )


def _unparsable_answer(answer: str, problem: Problem | None, detail: str) -> ValueError:
    where = f" ({problem.source})" if problem else ""
    return ValueError(f"MathVerify cannot parse the answer {answer!r}{where} {detail}".rstrip())


class _Worker:
    """A running _worker.py and the connection to it.

    It is a separate program and not a ``multiprocessing.Process``. Spawning such a process would import the main module again, which
    for a training run is torch, Lightning and transformers; forking would copy CUDA's state and threads' locks.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.connection, theirs = multiprocessing.Pipe()
        # -P keeps the script's folder off sys.path, where this file would shadow the library of the same name.
        # start_new_session: Ctrl-C reaches only the trainer, which then ends the worker.
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
            raise RuntimeError("MathVerify's worker ended during its start; see its error above") from None

    def kill(self) -> int:
        """Kill the process, wait for it so that no zombie is left, and return its exit status."""
        self.process.kill()
        self.connection.close()
        return self.process.wait()


_lock = threading.Lock()
_worker: _Worker | None = None
"""The worker of this process, started for the first completion. It is a global because a component holds no state."""


def _grade(completion: str, answer: str, seconds: float) -> tuple[str, str]:
    """Return the worker's verdict, or ``timeout``. A worker that has not answered when this function ends is killed."""
    global _worker
    if _worker is not None and _worker.owner != os.getpid():
        _worker = None  # inherited through a fork: it belongs to the parent
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
