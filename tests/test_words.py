"""The words of the code: none of the first edition's dialect, docstrings that stand alone, a top level that is a map."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLD = [
    r"\bweightings?\b", r"\bWeighting\b", r"needs_scores|needs_reference|needs_policy_entropy", r"\bvaries_over_tokens\b",
    r"\bcompares_within_group\b", r"\bneeds_constant_advantage\b", r"\bbehind_the_head\b", r"\bhead_replaced\b", r"\bDrawn\b",
    r"\bBeside\b|beside_sampling", r"prompts/(drawn|all_right|all_wrong)", r"\ball_right\b|\ball_wrong\b", r"\bone_voice\b",
    r"\bis_penalty\b", r"\bcompletion_scores\b", r"\bbatch\.(updates|passes|score)\b", r"\bSynced\b", r"\bPrepares\b",
    r"\broomy\b|\bRoomyLayer\b|\bROOM\b", r"\bPATIENCE\b|\bBEAT\b", r"\bset_anew\b", r"\bstarted_apart\b", r"\bfunction_of\b",
    r"filter\.dynamic_sampling=", r"\bof_guide\b", r"\bwith_gradient\b", r"\bcollections? is\b", r"override /(weighting|penalty)",
    r"\bpenalty=\[", r"reward\.(right|wrong|penalty)\b", r"\bParts\b", r"\bscores_can_wait\b", r"\.rest\(\)",
]  # fmt: skip
"""Left column of the list of names; where a word is also plain English, the pattern is its old use."""
PLACES = ("rlmod", "conf", "docs", "tests", "tools", "examples", "README.md")
NOT_A_START = ("Of", "As", "By", "That", "What", "With", "Where", "Whether")
STAGES = {"data", "sampler", "guide", "reward", "filter", "reference", "shaper", "correction", "aggregation", "loss"}
STAGES |= {"regularizer", "adapter", "strategy"}
FLOORS = {"rollout", "model", "training", "config", "commands"}


def texts() -> list[Path]:
    files: list[Path] = []
    for place in PLACES:
        path = ROOT / place
        files += (
            [path]
            if path.is_file()
            else sorted(p for p in path.rglob("*") if p.suffix in (".py", ".yaml", ".md", ".html"))
        )
    return [file for file in files if file != Path(__file__)]


@pytest.mark.parametrize("pattern", OLD)
def test_no_word_of_the_old_dialect_is_left(pattern):
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file in texts()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, "\n".join(found)


def docstrings(file: Path) -> list[tuple[int, str]]:
    """Docstrings of modules, classes, functions and attributes: every expression that is a string."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return [
        (node.lineno, node.value.value)
        for node in nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def test_every_docstring_begins_with_a_verb_or_a_noun_phrase():
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text.strip().splitlines()[0][:100]}"
        for place in ("rlmod", "tests", "tools", "examples")
        for file in sorted((ROOT / place).rglob("*.py"))
        for line, text in docstrings(file)
        if text.split() and text.split()[0].strip(",.:;") in NOT_A_START
    ]
    assert not found, "\n".join(found)


def test_the_legend_stands_in_each_file_that_uses_the_marks():
    legend = "[S] stated by the source, [D] our decision, [R] our reconstruction."
    files = sorted((ROOT / "rlmod").rglob("*.py"))
    assert not [file for file in files if re.search(r"\[[DR]\]", file.read_text()) and legend not in file.read_text()]


def test_the_top_level_is_stages_floors_and_at_most_eight_files():
    entries = [entry for entry in (ROOT / "rlmod").iterdir() if not entry.name.startswith((".", "__pycache__"))]
    assert {entry.name for entry in entries if entry.is_dir()} == STAGES | FLOORS
    assert len([entry for entry in entries if entry.is_file() and entry.suffix == ".py"]) <= 8
