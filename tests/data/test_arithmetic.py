import re

import pytest
from jaxtyping import TypeCheckError

from rlmod.data.arithmetic import Arithmetic, solve


def evaluated(chain: str, modulus: int) -> int:
    """From left to right: every number but the first closes a parenthesis."""
    numbers = chain.count("+") + chain.count("-") + chain.count("*")
    return eval("(" * numbers + re.sub(r"([+\-*]\d+)", r"\1)", chain)) % modulus


def test_an_example_worked_by_hand():
    # 3 + 5 = 8; 8 * 2 = 16, 6 modulo 10; 6 - 9 = -3, 7 modulo 10.
    assert solve("3+5*2-9", modulus=10) == (["3+5=8", "8*2=6", "6-9=7"], "7")


@pytest.mark.parametrize("modulus", [2, 10, 97])
def test_answers_are_right(modulus):
    problems = Arithmetic(split="train", size=300, modulus=modulus, min_numbers=8, max_numbers=9)()
    for problem in problems:
        chain = str(problem.prompt).removesuffix(":")
        assert int(problem.answer) == evaluated(chain, modulus)
        assert 8 <= len(re.findall(r"\d+", chain)) <= 9
        assert problem.source == f"arithmetic:{chain}"


def test_train_and_held_out_share_nothing_whatever_the_seeds():
    train = {p.prompt for seed in range(5) for p in Arithmetic(split="train", size=3000, max_numbers=4, seed=seed)()}
    held_out = {
        p.prompt for seed in range(5) for p in Arithmetic(split="held_out", size=1000, max_numbers=4, seed=seed)()
    }
    assert len(train) > 10_000
    assert len(held_out) > 3000
    assert not train & held_out


def test_no_problem_stands_twice():
    problems = Arithmetic(split="held_out", size=2000)()
    assert len({p.prompt for p in problems}) == len(problems) == 2000


def test_the_seed_decides():
    first = Arithmetic(split="train", size=50, seed=1)
    assert first() == first()
    assert first() != Arithmetic(split="train", size=50, seed=2)()


def test_only_the_operations_asked_for():
    problems = Arithmetic(split="train", size=50, operations="+")()
    assert all(re.fullmatch(r"\d(\+\d)+:", str(p.prompt)) for p in problems)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "test"}, "split"),
        ({"size": 0}, r"data\.\*\.size must be at least 1"),
        ({"min_numbers": 1}, r"data\.\*\.min_numbers must be at least 2"),
        ({"min_numbers": 5, "max_numbers": 4}, r"at most data\.\*\.max_numbers, got 5 and 4"),
        ({"modulus": 1}, r"data\.\*\.modulus must be at least 2"),
        ({"operations": "+/"}, r"data\.\*\.operations must contain only \+-\*, got '\+/'"),
        ({"operations": ""}, r"data\.\*\.operations"),
        ({"size": 400, "min_numbers": 2, "max_numbers": 2}, "only about 270 train problems of 2 to 2 numbers exist"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises((ValueError, TypeCheckError), match=message):
        Arithmetic(**{"split": "train", "size": 10} | fields)
