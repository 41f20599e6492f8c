"""Text is read and written as UTF-8, whatever the locale is."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import refused_eval

ROOT = Path(__file__).parents[1]
TEXT = {"read_text": 0, "write_text": 1}
"""Methods of Path that read or write text, and the position of their argument ``encoding``."""


def calls_without_encoding(source: str) -> Iterator[int]:
    """Lines of the calls that open a file as text and leave its encoding to the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id == "open":
            yield from [] if _binary(node, position=1) else [node.lineno]
        elif isinstance(function, ast.Attribute) and function.attr in TEXT:
            yield from [] if len(node.args) > TEXT[function.attr] else [node.lineno]
        elif isinstance(function, ast.Attribute) and function.attr == "open":
            other = isinstance(function.value, ast.Name) and function.value.id in ("os", "archive")
            yield from [] if other or _binary(node, position=0) else [node.lineno]
        elif any(k.arg == "text" and ast.unparse(k.value) == "True" for k in node.keywords):  # a process's output
            yield node.lineno


def _binary(call: ast.Call, position: int) -> bool:
    mode = next((k.value for k in call.keywords if k.arg == "mode"), None)
    mode = mode or (call.args[position] if len(call.args) > position else None)
    return isinstance(mode, ast.Constant) and "b" in str(mode.value)


def test_the_check_finds_what_it_looks_for():
    assert list(
        calls_without_encoding("open(a)\nopen(a, 'rb')\nopen(a, encoding='x')\np.open('w')\np.open(mode='rb')")
    ) == [1, 4]
    assert list(calls_without_encoding("p.read_text()\np.write_text(s)\np.read_text('utf-8')\nos.open(a)")) == [1, 2]


@pytest.mark.parametrize("place", ["rlmod", "examples"])
def test_every_file_of_text_is_opened_with_an_encoding(place):
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / place).rglob("*.py"))
        for line in calls_without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_files_are_utf_8_and_the_console_does_not_fail_in_an_ascii_locale(tmp_path):
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text('{"completion": "π ≈ #3", "answer": "3"}\n', encoding="utf-8")
    code = "from rlmod.commands.evaluate import *; cli.run(lambda cfg: (evaluate(cfg), print(chr(960))), 'eval')"
    command = [sys.executable, "-c", code, "completions=recorded.jsonl", "output=scored.jsonl"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
    environment = {**os.environ, **locale, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "π ≈ #3" in (tmp_path / "scored.jsonl").read_text(encoding="utf-8")
    assert "mean reward 1.0000" in done.stdout
    assert r"\u03c0" in done.stdout


def test_an_argument_that_is_not_text_is_refused(monkeypatch):
    assert "is not text in this locale" in refused_eval(monkeypatch, "output=\udcff")
