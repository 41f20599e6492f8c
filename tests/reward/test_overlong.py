from dataclasses import replace

import pytest

from rlmod.reward.overlong import Overlong
from rlmod.types import Texts


def texts(*lengths):
    return Texts(completions=[""] * len(lengths), answers=[""] * len(lengths), lengths=lengths)


def test_equation_13_by_hand():
    # start = 100 - 20 = 80: (80 - 81)/20 = -0.05, (80 - 95)/20 = -0.75
    assert Overlong(max_tokens=100, buffer=20)(texts(0, 79, 80, 81, 95, 100, 101, 500)) == pytest.approx(
        [0, 0, 0, -0.05, -0.75, -1, -1, -1]
    )


def test_the_penalty_scales_it():
    assert Overlong(max_tokens=100, buffer=20, scale=0.4)(texts(80, 90, 100, 130)) == pytest.approx(
        [0, -0.2, -0.4, -0.4]
    )


def test_a_buffer_as_long_as_the_limit_punishes_from_the_first_token():
    assert Overlong(max_tokens=10, buffer=10)(texts(0, 1, 10)) == pytest.approx([0, -0.1, -1])


def test_without_lengths_it_says_what_it_needs():
    with pytest.raises(ValueError, match="Overlong needs the lengths"):
        Overlong(max_tokens=10, buffer=5)(replace(texts(1), lengths=None))


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"max_tokens": 10, "buffer": 0}, "reward.buffer"),
        ({"max_tokens": 10, "buffer": 11}, "reward.buffer"),
        ({"max_tokens": 0, "buffer": 1}, "reward.max_tokens"),
        ({"max_tokens": 10, "buffer": 1, "scale": -1.0}, "reward.scale"),
    ],
)
def test_a_field_out_of_range_is_named(fields, key):
    with pytest.raises(ValueError, match=f"^{key} must"):
        Overlong(**fields)
