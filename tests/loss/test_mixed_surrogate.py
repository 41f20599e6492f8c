from dataclasses import replace

import pytest
import torch

from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.loss.mixed_surrogate import MixedSurrogate
from tests.rollouts import measured, rows_with

RATIOS = [[1.5, 0.5], [1.5, 0.5]]
OF_GUIDE = torch.tensor([False, True])


def gradient(
    loss: MixedSurrogate | ClippedSurrogate, advantage: float, ratios=RATIOS, guide_metrics=OF_GUIDE
) -> list[list[float]]:
    lp, rows = rows_with(ratios, [[advantage] * 2] * 2, [[1, 1], [1, 1]])
    loss(lp, replace(rows, from_guide=guide_metrics))[0].sum().backward()
    return lp.grad.tolist()


def test_each_sort_of_row_has_its_own_bounds():
    # A = 1: the ratio 1.5 is above 1.28 and gives no gradient; 0.5 always does.
    assert gradient(MixedSurrogate(), 1.0) == [[0, -0.5], [0, -0.5]]
    assert gradient(MixedSurrogate(guide_clip="none"), 1.0) == [[0, -0.5], [-1.5, -0.5]]
    assert gradient(MixedSurrogate(guide_clip=(0.2, 0.6)), 1.0) == [[0, -0.5], [-1.5, -0.5]]
    # A = -1: 0.5 is below 0.8 and gives none.
    assert gradient(MixedSurrogate(), -1.0) == [[1.5, 0], [1.5, 0]]
    assert gradient(MixedSurrogate(guide_clip=(0.6, 0.2)), -1.0) == [[1.5, 0], [1.5, 0.5]]


def test_without_bounds_nothing_is_clipped():
    """LUFFY's script: the gradient of the policy's own tokens is -w A, wherever the ratio is."""
    for bounds in ({"clip_low": None, "clip_high": None}, {"clip_low": None, "clip_high": None, "guide_clip": "none"}):
        assert gradient(MixedSurrogate(**bounds), 1.0) == [[-1.5, -0.5], [-1.5, -0.5]]
        assert gradient(MixedSurrogate(**bounds), -1.0) == [[1.5, 0.5], [1.5, 0.5]]
    assert gradient(MixedSurrogate(clip_low=None), -1.0) == [[1.5, 0.5], [1.5, 0.5]]
    assert gradient(MixedSurrogate(clip_low=None), 1.0) == [[0, -0.5], [0, -0.5]]


def test_saturating_shaping_by_hand():
    # f(w) = w / (w + 0.1); f' w = 0.1 w / (w + 0.1)^2: at w = 0.1 it is 1/4, at w = 0.9 it is 0.09.
    ratios = [[0.1, 0.9], [0.1, 0.9]]
    found = gradient(MixedSurrogate(guide_shaping="saturating", guide_clip="none"), 1.0, ratios)
    assert found[0] == pytest.approx([-0.1, -0.9])
    assert found[1] == pytest.approx([-0.25, -0.09])
    wide = gradient(MixedSurrogate(guide_shaping="saturating", guide_clip="none", gamma=0.9), 1.0, ratios)
    assert wide[1] == pytest.approx([-0.9 * 0.1 / 1.0, -0.9 * 0.9 / 1.8**2])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("guide_metrics", [OF_GUIDE, torch.tensor([False, False])])
def test_with_the_defaults_it_is_the_clipped_surrogate(advantage, guide_metrics):
    plain = gradient(ClippedSurrogate(clip_low=0.2, clip_high=0.28), advantage)
    assert gradient(MixedSurrogate(), advantage, guide_metrics=guide_metrics) == plain


def test_without_guide_rows_the_record_need_not_say_so():
    lp, rows = rows_with(RATIOS, [[1, -1]] * 2, [[1, 1], [1, 0]])
    mixed, metrics = MixedSurrogate(guide_clip="none", guide_shaping="saturating")(lp, rows)
    plain, expected = ClippedSurrogate(clip_low=0.2, clip_high=0.28)(lp, rows)
    assert torch.equal(mixed, plain)
    assert all(torch.equal(metrics[name], value) for name, value in expected.items())
    assert len(measured(metrics["guide_ratio"], rows.mask)) == 0  # not logged at all


def test_metrics_are_apart():
    lp, rows = rows_with(RATIOS, [[1, 1]] * 2, [[1, 1], [1, 1]])
    _, metrics = MixedSurrogate(guide_clip="none")(lp, replace(rows, from_guide=OF_GUIDE))
    assert (
        measured(metrics["ratio"], rows.mask).mean().item()
        == measured(metrics["guide_ratio"], rows.mask).mean().item()
        == pytest.approx(1)
    )
    assert (
        measured(metrics["clip_fraction"], rows.mask).mean().item(),
        measured(metrics["guide_clip_fraction"], rows.mask).mean().item(),
    ) == (0.5, 0)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"guide_clip": "all"}, "loss.guide_clip"),
        ({"guide_clip": [0.2]}, "loss.guide_clip"),
        ({"guide_clip": [2.0, 0.2]}, "loss.guide_clip"),
        ({"clip_high": 0.0}, "loss.clip_high"),
        ({"gamma": 0.0}, "loss.gamma"),
    ],
)
def test_bad_fields_are_named(fields, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        MixedSurrogate(**fields)
