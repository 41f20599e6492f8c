r"""The section of a text that holds the final answer, as text for math-verify to parse.

It imports neither math-verify nor SymPy, so that the trainer can use it.
"""

import re
from decimal import Decimal

NUMBER = r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?\s*%?"
HASHES = re.compile(rf"####[ \t]*({NUMBER})[ \t]*\.?[ \t]*$", re.MULTILINE)
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
THIN_SPACES = re.compile(r"(?<=\d)(?:\\[,;:! ]|~|\{,\})(?=\d{3}(?!\d))")
r"""LaTeX's separators of thousands, as in 1\,234."""
LABEL = re.compile(
    r"^\\(?:text|textbf|mathrm|mbox)\s*\{\s*(?:the\s+)?(?:final\s+)?answer\s*(?:is)?\s*[:=]?\s*\}\s*[:=]?",
    re.IGNORECASE,
)
r"""A label in front of the answer, as in \text{Answer: }8."""


def final_answer(text: str) -> str:
    """Return the section of a completion to parse: its last box, else its last ``#### number``, else the full text.

    A last box that is cut off gives the empty text: the completion withdrew its earlier answer and did not finish the new one. From the
    full text math-verify takes the last number or formula.
    """
    text = _normalize_signs(text)
    content = last_box(text)
    if content is not None:
        return normalize_answer(content) if content else ""
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
    text = THIN_SPACES.sub("", LABEL.sub("", text)).strip()
    if re.fullmatch(NUMBER, text):
        number, _, percent = re.sub(r"[$,+\s]", "", text.replace("e+", "e").replace("E+", "e")).partition("%")
        return (f"{Decimal(number):f}" if "e" in number.lower() else number) + (
            "%" if percent or text.endswith("%") else ""
        )
    return f"\\boxed{{{text}}}"


def _normalize_signs(text: str) -> str:
    """Convert minus signs and escaped signs to ASCII, and remove a currency after the sign: -$5 becomes -5."""
    text = text.replace("\u2212", "-").replace("\\$", "").replace("\\%", "%")
    return re.sub(r"-\$(?=[\d.])", "-", text)


def last_box(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{8}``, ``\boxed 8`` or ``\fbox{8}``; "" if it is cut off; None if there is no box."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):  # TeX takes the next token
        token = re.match(r"\\[a-zA-Z]+|\S", text[start:])
        return token[0] if token else ""
    depth = 1
    for end in range(start + 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 1 : end]
    return ""  # cut off inside the box


def gold_text(answer: str) -> str:
    """Return the section of a problem's answer to parse: its last box, else its last ``#### number``, else all of it; "" if cut off."""
    content = last_box(_normalize_signs(answer))
    if content == "":
        return ""
    hashes = HASHES.findall(_normalize_signs(answer))
    return normalize_answer(content if content is not None else hashes[-1] if hashes else answer.strip().strip("$"))


def is_number(text: str) -> bool:
    """Return True if ``normalize_answer`` found a number in this text, which math-verify can always parse."""
    return re.fullmatch(NUMBER, text) is not None
