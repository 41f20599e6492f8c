"""The checks of the sandbox: files that may be opened, and text that may be evaluated."""

import ast
import os
import sys

import pytest

from rlmod.reward import _sandbox
from rlmod.reward._pool_server import PoolSettings, _call

INSIDE = os.path.join(sys.prefix, "pyvenv.cfg")


@pytest.mark.parametrize(("path", "flags"), [(INSIDE, 0), (INSIDE.encode(), os.O_CLOEXEC), (sys.prefix, None)])
def test_pythons_own_files_may_be_read(path, flags):
    _sandbox._check_open(path, "r", flags)


@pytest.mark.parametrize(
    ("path", "flags"),
    [
        ("/etc/passwd", 0),
        (b"/etc/passwd", 0),
        (f"{sys.prefix}/../../../../../../../../etc/passwd", 0),
        (f"{sys.base_prefix}-other/file", 0),
        (3, 0),
        (INSIDE, os.O_WRONLY),
        (INSIDE, os.O_RDWR),
        (INSIDE, os.O_CREAT),
        (INSIDE, os.O_TRUNC),
    ],
)
def test_other_files_and_writing_are_denied(path, flags):
    with pytest.raises(_sandbox.Denied, match="open"):
        _sandbox._check_open(path, "r", flags)


def test_a_link_out_of_pythons_folders_is_denied(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    _sandbox._check_open(str(tmp_path / "file"), "r", 0)
    with pytest.raises(_sandbox.Denied):
        _sandbox._check_open(str(tmp_path / "link"), "r", 0)


def test_a_root_folder_in_the_path_opens_nothing(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/"])
    with pytest.raises(_sandbox.Denied):
        _sandbox._check_open("/etc/passwd", "r", 0)


@pytest.mark.parametrize(
    "source",
    [
        None, "1 + 2 * max(3, x)", "Integer(4) ** Rational(1, 2)", "{'a': [1, (2,)]}", "not x < 3 and y", "1 +", "\0",
        _sandbox.SYMPY_PROLOGUE, _sandbox.SYMPY_PROLOGUE.encode(), ast.parse("abs(-1)", mode="eval"),
    ],
)  # fmt: skip
def test_arithmetic_may_be_evaluated(source):
    _sandbox._check_source(source, "<string>")


@pytest.mark.parametrize(
    "source",
    [
        "().__class__", "__import__", "open('x')", "eval('1')", "getattr(x, 'y')", "[x for x in y]", "lambda: 0", "(x := 1)", "f'{x}'",
        "import os", "x = 1", "x[0]", "from sympy import *; import os", ast.parse("import os"), b"open('x')", "max(open('x'), 1)",
    ],
)  # fmt: skip
def test_other_text_is_not_evaluated(source):
    with pytest.raises(_sandbox.Denied, match="evaluate text"):
        _sandbox._check_source(source, "<string>")


def test_only_what_happens_while_a_completion_is_scored_is_denied():
    _sandbox._check("subprocess.Popen", ())
    with _sandbox.scoring() as denied:
        for event, arguments in (
            ("socket.connect", ()),
            ("open", ("/etc/passwd", "r", 0)),
            ("compile", ("f'{x}'", "")),
        ):
            with pytest.raises(_sandbox.Denied):
                _sandbox._check(event, arguments)
        _sandbox._check("object.__getattr__", ())
        assert len(denied) == 3
    _sandbox._check("socket.connect", ())
    with _sandbox.scoring() as denied:
        assert denied == []


def test_a_scorer_that_hides_what_it_was_denied_gets_no_value():
    def hides() -> float:
        with pytest.raises(_sandbox.Denied):
            _sandbox._check("socket.connect", ())
        return 1.0

    settings = PoolSettings("", 1, None, 1.0, sandboxed=True)
    assert _call(settings, hides, ()) == ("error", "it is not allowed: socket.connect")
    assert _call(settings, lambda: 2.0, ()) == ("ok", 2.0)
