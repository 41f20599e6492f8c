"""sampler=hf and the forward pass must agree; the first rollout batch shows it."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from rlmod.sampler.hf import HF
from tests.command_line import SHORT, answer, run_train

QUICK = (*SHORT, "trainer.max_epochs=2", "data.validation=null")


@dataclass(frozen=True, kw_only=True)
class Shifted(HF):
    """Records log-probabilities that are off by ``shift`` nats, as a policy does that computes something else while it generates."""

    shift: float = 0.0

    def __call__(self, policy: Any, prompts: Any, seed: int, on_finished: Any = None) -> Any:
        rows = super().__call__(policy, prompts, seed, on_finished)
        assert rows.logprobs is not None
        return replace(rows, logprobs=torch.where(rows.mask, rows.logprobs - self.shift, rows.logprobs))


@pytest.mark.parametrize("shift", [0.12, -0.5, float("nan")])
def test_a_sampler_that_disagrees_with_the_forward_pass_is_refused(shift, tmp_path, monkeypatch):
    target = "sampler._target_=tests.training.test_sampler_agreement.Shifted"
    words = (*QUICK, target, f"+sampler.shift={shift}".replace("nan", ".nan"), f"output={tmp_path / 'a'}")
    message = answer(lambda: run_train(monkeypatch, *words))
    if shift != shift:
        assert "nan" in message
    else:
        assert f"differ from those of a forward pass by {abs(shift):.2f}" in message


def test_a_small_difference_is_no_fault(tmp_path, monkeypatch):
    target = "sampler._target_=tests.training.test_sampler_agreement.Shifted"
    run_train(monkeypatch, *QUICK, target, "+sampler.shift=0.05", f"output={tmp_path / 'a'}")
    assert "recomputed" not in (tmp_path / "a" / "metrics.csv").read_text()
