"""The plan against the memory that whole runs take, each in a process of its own."""

import pytest

from tools.bench_plan import CASES, compared

pytestmark = pytest.mark.slow

SMALL = ("wide", "deep", "large vocabulary")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SMALL], ids=lambda case: case.name)
def test_the_peak_of_training_is_foretold_within_20_percent(case):
    planned, measured = compared(case)
    assert planned == pytest.approx(measured, rel=0.2)
