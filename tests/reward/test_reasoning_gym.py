"""reasoning-gym's scorers: some evaluate a model's text as Python, and some raise."""

import warnings

import pytest

from rlmod.data.reasoning_gym import ReasoningGym as Problems
from rlmod.reward._compute import compute_rewards
from rlmod.reward.reasoning_gym import ReasoningGym
from rlmod.types import Texts

EVALUATING = (
    "countdown",
    "puzzle24",
    "polynomial_multiplication",
    "string_insertion",
    "spiral_matrix",
    "n_queens",
    "binary_matrix",
)
"""Tasks whose scorer evaluates the answer."""


def graded(task: str, *answers: str | None, **settings):
    problem = Problems(task=task, split="train", size=1, seed=1)()[0]
    shown = [problem.answer if answer is None else answer for answer in answers]
    return compute_rewards(
        ReasoningGym(**settings),
        Texts(
            completions=[f"<answer>{answer}</answer>" for answer in shown],
            answers=[problem.answer] * len(shown),
            problems=[problem] * len(shown),
        ),
    )


@pytest.mark.parametrize("task", EVALUATING)
def test_code_in_an_answer_is_not_executed_and_is_counted(task, tmp_path, monkeypatch):
    monkeypatch.setenv("RLMOD_SECRET", "24")
    victim = tmp_path / "written"
    attacks = [
        f"__import__('os').system('touch {victim}')",
        f"__import__('pathlib').Path('{victim}').write_text('x')",
        f"open('{victim}', 'w')",
        f"[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0]('touch {victim}', shell=True)",
        "__import__('os').environ['RLMOD_SECRET']",
        "open('/proc/self/environ').read()",
        "__import__('os')._exit(0)",
        "exit()",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        f"exec(\"import os; os.mkdir('{victim}')\")",
        "(lambda: 24)()",
        "9**9**9**9**9",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = graded(task, *attacks, timeout_seconds=2.0)
    assert not victim.exists()
    failed = result.failed[""].errors | result.failed[""].timeouts
    # A scorer that never evaluates this text gives it at most what it gives any text.
    harmless = graded(task, *[f"'{'x' * len(attack)}'" for attack in attacks]).rewards.tolist()
    for attack, reward, counted, other in zip(attacks, result.rewards.tolist(), failed.tolist(), harmless, strict=True):
        assert reward == 0 or (not counted and reward <= max(other, 0.05)), attack
    assert failed.sum() >= 1


def test_an_answer_that_makes_the_scorer_hang_or_raise_gets_0_and_is_counted():
    with pytest.warns(UserWarning, match="1 of 2 completions"):
        result = graded("countdown", "9**9**9**9**9", None, timeout_seconds=2.0)
    assert result.rewards.tolist() == [0.0, 1.0]
    assert (result.failed[""].timeouts | result.failed[""].errors).tolist() == [True, False]
    with pytest.warns(UserWarning, match="1 of 2 completions"):
        result = graded("prime_factorization", "two times three", None)
    assert result.rewards.tolist() == [0.0, 1.0]
    assert result.failed[""].errors.tolist() == [True, False]


@pytest.mark.parametrize(
    "task",
    [
        *EVALUATING,
        "basic_arithmetic",
        "chain_sum",
        "gcd",
        "leg_counting",
        "simple_integration",
        "number_sorting",
        "sudoku",
        "maze",
    ],
)
def test_the_gold_answer_gets_1(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graded(task, None).rewards.tolist() == [1.0]
