"""Regular expressions on a model's text, with a time limit: some patterns take exponentially long on some texts."""

import regex

SECONDS = 5.0
"""Time limit for one pattern on one completion."""


class PatternTimeout(TimeoutError):
    """A pattern took too long on a completion."""


def check_pattern(pattern: str) -> int:
    """Return the number of groups. ValueError if the pattern is not a regular expression."""
    try:
        return regex.compile(pattern).groups
    except regex.error as error:
        raise ValueError(f"reward.pattern={pattern!r} is not a regular expression: {error}") from error


def last_match(pattern: str, text: str, *, dot_all: bool = False) -> str | None:
    """Return group 1 of the last match, or the whole match if there is no group; None without a match. PatternTimeout after 5 s."""
    flags = regex.DOTALL if dot_all else 0
    last = None
    try:
        for match in regex.compile(pattern, flags).finditer(text, timeout=SECONDS):
            last = match
    except TimeoutError:
        raise _timeout(pattern) from None
    if last is None:
        return None
    return last[1] if last.re.groups else last[0]


def matches_whole(pattern: str, text: str) -> bool:
    """Return True if the pattern matches the whole text; its dot also matches line ends. PatternTimeout after 5 s."""
    try:
        return regex.compile(pattern, regex.DOTALL).fullmatch(text, timeout=SECONDS) is not None
    except TimeoutError:
        raise _timeout(pattern) from None


def _timeout(pattern: str) -> PatternTimeout:
    return PatternTimeout(f"the pattern {pattern!r} took longer than {SECONDS:.0f} s")
