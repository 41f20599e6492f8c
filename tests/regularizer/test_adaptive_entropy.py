"""An entropy bonus whose coefficient follows the entropy of the step before."""

from dataclasses import replace

import pytest
import torch

from rlmod.regularizer.adaptive_entropy import AdaptiveEntropy
from rlmod.types import build_rollouts
from tests.command_line import SHORT
from tests.runs import finished, metrics, weights
from tests.training.modules import module, training_rows


def applied(regularizer: AdaptiveEntropy, entropy: float) -> float:
    """The coefficient that the step applies, whose mean entropy this is."""
    values = torch.tensor([[entropy + 0.1, entropy - 0.1]], requires_grad=True)
    rows = build_rollouts(mask=torch.ones(1, 2, dtype=torch.bool), policy_entropy=values)
    per_token, metrics = regularizer(torch.zeros(1, 2), rows)
    (gradient,) = torch.autograd.grad(per_token.sum(), values)
    assert (gradient == -metrics["entropy_coefficient"]).all()
    regularizer.after_step({"policy_entropy": float(torch.as_tensor(metrics["policy_entropy"]).mean())})
    return -float(gradient[0, 0])


def test_by_hand():
    regularizer = AdaptiveEntropy()
    found = [applied(regularizer, entropy) for entropy in (0.3, 0.15, 0.18, 0.25, 0.19)]
    assert found == pytest.approx([0, 0, 0.005, 0.01, 0])
    assert regularizer.state_dict() == {"coefficient": pytest.approx(0.01), "entropy": pytest.approx(0.19)}


def test_the_coefficient_stays_within_its_bounds():
    regularizer = AdaptiveEntropy(step=0.4)
    assert [applied(regularizer, 0.1) for _ in range(5)] == pytest.approx([0, 0.4, 0.8, 1, 1])
    for _ in range(9):
        applied(regularizer, 0.3)
    assert regularizer.state["coefficient"] == 0


def test_the_entropy_is_the_mean_over_all_tokens_of_the_step():
    """Two micro-batches of one and of three rows: 12 tokens, of which 2 are masked out."""
    made = module(regularizer={"adaptive": AdaptiveEntropy(target=100.0)})
    rows = training_rows()
    rows = replace(rows, mask=torch.tensor([[True, False, False], [True] * 3, [True] * 3, [True] * 3]))
    with torch.no_grad():
        whole = made.training_step(rows, 0)
    total, count = made.adaptive_metrics["adaptive"].reduce_and_reset()["policy_entropy"]
    assert count == 10
    for part in (slice(0, 1), slice(1, 4)):
        with torch.no_grad():
            made.training_step(rows.rows(part), 0)
    split = made.adaptive_metrics["adaptive"].reduce_and_reset()["policy_entropy"]
    assert split == pytest.approx((total, count))
    assert whole.isfinite()
    made.adaptive_metrics["adaptive"].add(
        "policy_entropy", torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    )
    made._adapt(step_counts=False)
    assert made.adaptive["adaptive"].state_dict()["coefficient"] == 0
    made.adaptive_metrics["adaptive"].add(
        "policy_entropy", torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    )
    made._adapt(step_counts=True)
    assert made.adaptive["adaptive"].state_dict() == {"coefficient": 0.005, "entropy": 2.0}


def test_a_step_in_which_no_token_counts_changes_nothing(tmp_path):
    made = module(regularizer={"adaptive": AdaptiveEntropy(target=100.0)})
    made.adaptive_metrics["adaptive"].add("policy_entropy", torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    made._adapt(step_counts=True)
    assert made.adaptive["adaptive"].state_dict() == {"coefficient": 0.0, "entropy": float("inf")}
    # Every completion is cut off, and left out of the loss.
    cut = ("correction=[overlong_filtering]", "sampler.max_new_tokens=2", "trainer.max_epochs=1")
    assert finished(tmp_path / "run", "experiment=adaptive_entropy", *SHORT, *cut).is_dir()


def test_a_checkpoint_holds_the_coefficient_and_the_entropy():
    regularizer = AdaptiveEntropy(target=0.3)
    applied(regularizer, 0.2)
    fresh = AdaptiveEntropy(target=0.3)
    fresh.load_state_dict(regularizer.state_dict())
    assert applied(fresh, 0.25) == applied(regularizer, 0.25) == pytest.approx(0.005)


def test_a_resumed_run_goes_on_with_the_same_coefficient(tmp_path):
    settings = (*SHORT, "regularizer=[adaptive_entropy]", "regularizer.adaptive_entropy.target=9", "optimizer.lr=1e-4")
    whole = finished(tmp_path / "whole", *settings, "trainer.max_epochs=4")
    first = finished(tmp_path / "first", *settings, "trainer.max_epochs=2")
    parts = finished(tmp_path / "parts", *settings, "trainer.max_epochs=4", f"resume={first}")
    for name, value in weights(whole).items():
        assert torch.equal(weights(parts)[name], value)
    coefficients = [
        float(row["train/entropy_coefficient"]) for row in metrics(whole) if row.get("train/entropy_coefficient")
    ]
    assert coefficients == sorted(coefficients)
    assert coefficients[-1] > coefficients[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": -1}, r"regularizer\.adaptive_entropy\.target must be finite and not negative, got -1"),
        ({"step": float("inf")}, r"regularizer\.adaptive_entropy\.step"),
        ({"initial": 2}, r"regularizer\.adaptive_entropy\.initial=2 must be at most maximum=1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveEntropy(**settings)
