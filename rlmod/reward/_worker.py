r"""The process in which math-verify and SymPy run, where they can be killed; started by MathVerify, as a script.

It reads (completion, answer, seconds) from a connection and sends back (verdict, detail), the verdict being ``right``,
``wrong``, ``gold`` (the answer cannot be parsed) or ``error``. It sends None once it is ready.
"""

import logging
import re
import signal
import sys
from functools import lru_cache
from multiprocessing.connection import Connection

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# A box, where there is one, is all that is parsed; no fallback to comparing raw strings.
CONFIG = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

NUMBER = r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)\s*%?"
HASHES = re.compile(rf"####[ \t]*({NUMBER})[ \t]*\.?[ \t]*$", re.MULTILINE)
BOX = "\\boxed{"


def final_answer(text: str) -> str:
    """Return the part of a completion to parse: its last box, else its last ``#### number``, else all of it, so that the last
    number or formula in it is what math-verify takes."""
    text = _plain(text)
    content = _last_box(text)
    if content is not None:
        return as_answer(content)
    if hashes := HASHES.findall(text):
        return as_answer(hashes[-1])
    # math-verify prefers what follows the word "answer", also in "to find the answer, add 5 and 3 to get 8".
    text = re.sub("(?i)answer", "result", text)
    # It reads over line ends: "5\n- 3" would be 2.
    text = re.sub(r"(?<=\d)\s*\n", " ;\n", text)
    # It sees a number only after white space or "=".
    return re.sub(r"(?<!\d)([:(>#*~≈→])(?=[-$]?\.?\d)", r"\1 ", text)


def as_answer(text: str) -> str:
    """A text that is nothing but an answer: a number as it stands, anything else as LaTeX in a box."""
    text = _plain(text).strip()
    if re.fullmatch(NUMBER, text):
        return re.sub(r"[$,+]", "", text)
    return f"{BOX}{text}}}"


def _plain(text: str) -> str:
    """Minus signs and escaped signs as ASCII has them, and the currency after the sign gone: -$5 is -5."""
    text = text.replace("\u2212", "-").replace("\\$", "").replace("\\%", "%")
    return re.sub(r"-\$(?=[\d.])", "-", text)


def _last_box(text: str) -> str | None:
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth = 1
    for end in range(start + len(BOX), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(BOX) : end]
    return None  # cut off inside the box


def _parsed(text: str) -> list:
    # Without math-verify's own time-outs: they are signals, which Python cannot handle while SymPy is in a C routine.
    return parse(text, CONFIG, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=1024)
def _gold(answer: str) -> list:
    content = _last_box(_plain(answer))
    hashes = HASHES.findall(_plain(answer))
    return _parsed(as_answer(content if content is not None else hashes[-1] if hashes else answer.strip().strip("$")))


def grade(completion: str, answer: str) -> tuple[str, str]:
    try:
        gold = _gold(answer)
    except Exception as error:  # whatever SymPy raises: the trainer reports it
        return "gold", f"{type(error).__name__}: {error}"
    if not gold:
        return "gold", ""
    try:
        # What cannot be parsed is an empty list, and wrong.
        right = verify(gold, _parsed(final_answer(completion)), timeout_seconds=None, raise_on_error=True)
    except Exception as error:
        return "error", type(error).__name__  # not its text: str() of a SymPy expression can take for ever
    return ("right" if right else "wrong"), ""


def main(descriptor: int) -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    sys.set_int_max_str_digits(0)  # a completion may be one endless number; the clock bounds what that costs
    connection = Connection(descriptor)
    grade(
        "\\boxed{\\frac{1}{2}}", "1"
    )  # builds the grammar's tables, so that the first row's clock does not pay for them
    connection.send(None)
    while True:
        try:
            completion, answer, seconds = connection.recv()
        except EOFError:  # the trainer is gone
            return
        # The trainer kills this process when the time is up. Should it be dead itself by then, the kernel does.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
        verdict = grade(completion, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(verdict)


if __name__ == "__main__":
    main(int(sys.argv[1]))
