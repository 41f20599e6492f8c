r"""The worker process for math-verify and SymPy, which can be killed. MathVerify starts it as a script.

It sends None once it is ready. Then it reads (completion, answer, seconds) from a connection and sends back (verdict, detail). The
verdict is ``correct``, ``incorrect``, ``gold`` (the answer cannot be parsed) or ``error``.
"""

import logging
import re
import signal
import sys
from functools import lru_cache
from multiprocessing.connection import Connection

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# If there is a box, only the box is parsed. There is no fallback to comparing raw strings.
CONFIG = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

NUMBER = r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)\s*%?"
HASHES = re.compile(rf"####[ \t]*({NUMBER})[ \t]*\.?[ \t]*$", re.MULTILINE)
BOX = "\\boxed{"


def final_answer(text: str) -> str:
    """Return the section of a completion to parse: its last box, else its last ``#### number``, else the full text.

    From the full text math-verify takes the last number or formula.
    """
    text = _normalize_signs(text)
    content = _last_box(text)
    if content is not None:
        return normalize_answer(content)
    if hashes := HASHES.findall(text):
        return normalize_answer(hashes[-1])
    # math-verify prefers the text after the word "answer", also in "to find the answer, add 5 and 3 to get 8".
    text = re.sub("(?i)answer", "result", text)
    # It reads expressions across line ends: "5\n- 3" would be 2.
    text = re.sub(r"(?<=\d)\s*\n", " ;\n", text)
    # It recognizes a number only after white space or "=".
    return re.sub(r"(?<!\d)([:(>#*~≈→])(?=[-$]?\.?\d)", r"\1 ", text)


def normalize_answer(text: str) -> str:
    """Return the text of an answer for parsing: a number as a plain number, anything else as LaTeX in a box."""
    text = _normalize_signs(text).strip()
    if re.fullmatch(NUMBER, text):
        return re.sub(r"[$,+]", "", text)
    return f"{BOX}{text}}}"


def _normalize_signs(text: str) -> str:
    """Convert minus signs and escaped signs to ASCII, and remove a currency after the sign: -$5 becomes -5."""
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


def _parse(text: str) -> list:
    # math-verify's own time-outs are off: they are signals, which Python cannot handle while SymPy is in a C routine.
    return parse(text, CONFIG, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=1024)
def _parse_gold(answer: str) -> list:
    content = _last_box(_normalize_signs(answer))
    hashes = HASHES.findall(_normalize_signs(answer))
    return _parse(
        normalize_answer(content if content is not None else hashes[-1] if hashes else answer.strip().strip("$"))
    )


def grade(completion: str, answer: str) -> tuple[str, str]:
    try:
        gold = _parse_gold(answer)
    except Exception as error:  # SymPy raises many types; the trainer reports them
        return "gold", f"{type(error).__name__}: {error}"
    if not gold:
        return "gold", ""
    try:
        # A completion that cannot be parsed gives an empty list, which is incorrect.
        correct = verify(gold, _parse(final_answer(completion)), timeout_seconds=None, raise_on_error=True)
    except Exception as error:
        return "error", type(error).__name__  # without its text: str() of a SymPy expression may never return
    return ("correct" if correct else "incorrect"), ""


def main(descriptor: int) -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its time-outs are off
    sys.set_int_max_str_digits(0)  # a completion may be one very long number; the time limit bounds its cost
    connection = Connection(descriptor)
    grade(
        "\\boxed{\\frac{1}{2}}", "1"
    )  # builds the grammar's tables, so that they do not count against the first row's time limit
    connection.send(None)
    while True:
        try:
            completion, answer, seconds = connection.recv()
        except EOFError:  # the trainer has ended
            return
        # The trainer kills this process when the time is up. If the trainer itself has died by then, this timer does.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
        verdict = grade(completion, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(verdict)


if __name__ == "__main__":
    main(int(sys.argv[1]))
