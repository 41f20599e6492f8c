"""Limits of a worker process that runs third-party code on a model's text.

What holds: memory is limited, no file can be written, no core is dumped. From Python code also: no network, no other process, no reading
outside Python's own folders, and no evaluation of text that is more than arithmetic. The environment is empty from the start (_pool.py).

What does not: this is no boundary against machine code. A fault in a C extension that executes a model's text would get past the audit
hook. Run such scorers in a container without network.
"""

import ast
import builtins
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DENIED = (
    *(
        "socket.",
        "subprocess.",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.kill",
        "ctypes.",
        "shutil.",
    ),
    *(
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.chmod",
        "os.chown",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.utime",
    ),
    *(
        "os.putenv",
        "os.unsetenv",
        "os.listdir",
        "os.scandir",
        "os.walk",
        "os.setxattr",
        "os.removexattr",
        "pty.",
        "webbrowser.",
    ),
    *(
        "urllib.",
        "http.",
        "ftplib.",
        "smtplib.",
        "sqlite3.",
        "mmap.",
        "code.",
        "pdb.",
        "sys.setprofile",
        "sys.settrace",
    ),
)
"""Prefixes of audit events that are refused while a completion is scored."""

ALLOWED_CALLS = frozenset({"abs", "max", "min", "pow", "round", "sum"})
"""Built-in functions that evaluated text may call."""

ARITHMETIC = (
    ast.Expression, ast.Module, ast.Expr, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.Name, ast.Load, ast.Call, ast.keyword,
    ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
"""Node types of a Python expression that evaluated text may consist of."""


SYMPY_PROLOGUE = "from sympy import *"
"""The statement that SymPy's parser executes before it evaluates an expression."""


class Denied(PermissionError):
    """The code tried something that the sandbox does not allow."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        _denied.append(what)


_scoring = False
_denied: list[str] = []


def limit_resources(memory_gib: float) -> None:
    """Limit the memory of this process to what it has plus ``memory_gib``; forbid writing files and dumping core."""
    with open("/proc/self/statm", encoding="utf-8") as stream:
        present = int(stream.read().split()[0]) * resource.getpagesize()
    limit = present + int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def install() -> None:
    """Install the audit hook. It cannot be removed again; it acts only inside ``scoring``."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.addaudithook(_check)


@contextmanager
def scoring() -> Iterator[list[str]]:
    """Refuse everything but computing, importing and reading Python's own files. Raises Denied inside the code that tries.

    Yield what was refused, because the code may catch the exception.
    """
    global _scoring
    _denied.clear()
    _scoring = True
    try:
        yield _denied
    finally:
        _scoring = False


def _check(event: str, arguments: tuple[Any, ...]) -> None:
    global _scoring
    if not _scoring:
        return
    if event == "open":
        _check_open(*arguments[:3])
    elif event == "compile":
        _scoring = False  # parsing compiles, too
        try:
            _check_source(*arguments[:2])
        finally:
            _scoring = True
    elif event.startswith(DENIED) and not _importing():
        raise Denied(event)


def _check_open(path: Any, mode: Any, flags: Any) -> None:
    writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)) if isinstance(flags, int) else False
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if writes or not isinstance(path, str) or not _belongs_to_python(path):
        raise Denied(f"open({path!r})")


def _belongs_to_python(path: str) -> bool:
    real = os.path.realpath(path)
    roots = {os.path.realpath(root) for root in (sys.prefix, sys.base_prefix, *sys.path) if root}
    return any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots if root != "/")


def _check_source(source: Any, filename: Any) -> None:
    """Refuse text that is compiled while a completion is scored, unless it is arithmetic or an import is in progress."""
    if source is None or source in (SYMPY_PROLOGUE, SYMPY_PROLOGUE.encode()) or _importing():
        return
    try:
        tree = source if isinstance(source, ast.AST) else ast.parse(source)
    except (SyntaxError, ValueError):
        return  # compiling it fails as well
    for node in ast.walk(tree):
        if not isinstance(node, ARITHMETIC):
            raise Denied(f"evaluate text with {type(node).__name__}")
        if isinstance(node, ast.Name) and node.id.startswith("__"):
            raise Denied(f"evaluate text with the name {node.id}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if hasattr(builtins, name) and name not in ALLOWED_CALLS:
                raise Denied(f"evaluate text that calls {name}")


def _importing() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
