"""Our losses, advantages and gradients against TRL's and verl's on random ragged data; writes docs/oracle.md.

``make oracle`` sets up an environment for each peer and runs this. The exit status is 1 where agreement that is claimed fails.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from rlmod.aggregation.constant import Constant
from rlmod.aggregation.rollout_mean import RolloutMean
from rlmod.aggregation.token_mean import TokenMean
from rlmod.correction.clip_cov import ClipCov
from rlmod.correction.forking_tokens import ForkingTokens
from rlmod.correction.kl_cov import KLCov
from rlmod.correction.truncated_importance import TruncatedImportance
from rlmod.interfaces import Aggregation, Correction, Loss, Regularizer, Shaper
from rlmod.loss.cispo import Cispo
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.loss.dppo import Dppo
from rlmod.loss.gmpo import Gmpo
from rlmod.loss.sapo import Sapo
from rlmod.loss.sequence_surrogate import SequenceSurrogate
from rlmod.model.policy import SHIPPED
from rlmod.regularizer.entropy_bonus import EntropyBonus
from rlmod.regularizer.kl import KL
from rlmod.regularizer.kl_cov import KLCov as KLCovPenalty
from rlmod.shaper.group_baseline import GroupBaseline
from rlmod.shaper.leave_one_out import LeaveOneOut
from rlmod.shaper.uniform import Uniform
from rlmod.types import Rollouts, build_rollouts

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "oracle.md"
SEEDS, GROUPS, G, T = 8, 5, 4, 13
TOLERANCE = 1e-6
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
Answer = dict[str, torch.Tensor]

DIFFERENCES = {
    (
        "a fully masked row, rollout mean",
        "TRL",
    ): "TRL counts such a row in the mean; verl and we do not",
}
"""Known differences of a peer, with the reason. Everything else must agree."""
NOT_COMPARED = """
## Known differences

| topic | TRL 1.16.0 | verl 0.9.1 | rlmod |
|---|---|---|---|
| eps added to the std of a group | 1e-4 | 1e-6 | 1e-6 (`shaper.eps`) |
| a fully masked row in the rollout mean | counts | does not | does not |
| dual clip (a bound on the loss at negative advantages) | off | on, at 3 | none; compared with verl's bound set out of reach |
| CISPO's bounds | only above, as the bound itself | both, as 1 - low and 1 + high | `clip_low: null` gives TRL's, a number verl's |
| SAPO's aggregation | always the rollout mean | always the rollout mean | `aggregation`; compared under `rollout_mean` |
| DPPO's bound and cap | (no such loss) | 0.2 of either kind; 3 | 0.15 (tv) or 0.05 (kl), 20; compared at these, cap 1.5 |
| gradient of the KL penalty k3 | k3's | k3's; `k3+` follows k2 | k2's by default (`regularizer.kl.gradient`) |
| KL times the ratio | `use_bias_correction_kl`: with the ratio's gradient | no | `regularizer.kl.importance`: without it |
| entropy bonus | always a mean over tokens | the loss's aggregation | the loss's weights: TRL's under token_mean |
| forking tokens by the entropy of | the policy in each step | (none in its losses) | pi_old, over the rollout batch |
| covariance of Clip-Cov and KL-Cov | (no such loss) | of the current policy, in each step | of pi_old; compared with verl's |
| GDPO's last step | over the completions | over the tokens | over the completions |
| log-ratios beyond +-20 | kept | clamped | clamped |
| GTPO, GRPO-S, GROP, FIPO, the guide, the zero-reward batch | none | none | implemented; no counterpart to compare with |
"""


def inputs(seed: int) -> Answer:
    """Ragged lengths from 1 to T, rewards that are no binary fractions, one group of equal rewards; in float64."""
    draw = torch.Generator().manual_seed(seed)
    rows = GROUPS * G
    lengths = torch.randint(1, T + 1, (rows,), generator=draw)
    lengths[1] = T
    mask = torch.arange(T) < lengths[:, None]
    logprobs = -3 * torch.rand(rows, T, generator=draw).double() - 1e-3
    noise = [torch.randn(rows, T, generator=draw).double() for _ in range(3)]
    rewards = torch.tensor([0.0, 0.1, 0.35, 1.0]).double()[torch.randint(0, 4, (rows,), generator=draw)]
    rewards[:G] = 0.35
    group = torch.arange(GROUPS).repeat_interleave(G)
    old = logprobs + 0.3 * noise[0]
    # Probabilities are below 1, or the divergences between them mean nothing.
    old, sampler, reference = (
        values.clamp(max=-1e-3) for values in (old, old + 0.2 * noise[1], logprobs + 0.2 * noise[2])
    )
    return {
        "mask": mask, "logprobs": logprobs, "old": old, "sampler": sampler, "reference": reference, 
        "entropy": 3 * torch.rand(rows, T, generator=draw).double(),
        "rewards": rewards, "group": group,
        "advantages": Uniform()(build_rollouts(mask=torch.ones(rows, 1).bool(), rewards=rewards, group=group))[:, 0],
    }  # fmt: skip


def ours(
    loss: Loss,
    aggregation: Aggregation,
    correction: Correction | None = None,
    penalty: Regularizer | None = None,
    masked_row: bool = False,
) -> Callable[[Answer], Answer]:
    def answer(case: Answer) -> Answer:
        mask = case["mask"].clone()
        if masked_row:
            mask[0] = False
        logprobs, entropy = (case[name].clone().requires_grad_() for name in ("logprobs", "entropy"))
        rollouts = build_rollouts(
            mask=mask, logprobs=case["old"], sampler_logprobs=case["sampler"], entropy=case["entropy"],
            reference_logprobs=case["reference"], policy_entropy=entropy,
            extra={"current": case["logprobs"]}, advantages=case["advantages"][:, None] * mask,
        )  # fmt: skip
        rollouts = rollouts if correction is None else correction(rollouts)
        per_token = loss(logprobs, rollouts)[0]
        if penalty is not None:
            per_token = per_token + penalty(logprobs, rollouts)[0]
        # The aggregations are exact up to float32; here they are to be exact.
        weights = aggregation(rollouts).double()
        weights = torch.where(mask, weights / weights.sum() * exact_sum(aggregation, mask), 0)
        value = (torch.where(mask, per_token, 0) * weights).sum()
        value.backward()
        assert logprobs.grad is not None
        bonus = {} if entropy.grad is None else {"entropy gradient": entropy.grad}
        return {"value": value.detach(), "gradient": logprobs.grad, **bonus}

    return answer


def exact_sum(aggregation: Aggregation, mask: torch.Tensor) -> float:
    """Return the sum of the weights: 1, except for the constant length."""
    if isinstance(aggregation, Constant):
        return float(mask.sum()) / (int(mask.any(1).sum()) * aggregation.length)
    return 1.0


def advantage(shaper: Shaper) -> Callable[[Answer], Answer]:
    return lambda case: {
        "value": shaper(build_rollouts(mask=case["mask"], rewards=case["rewards"], group=case["group"]))
    }


def of_current(correction: Correction) -> Correction:
    """Let a correction read the current policy's log-probabilities in place of pi_old's, as verl does."""

    def corrected(rollouts: Rollouts) -> Rollouts:
        found = correction(replace(rollouts, logprobs=rollouts.extra["current"]))
        return replace(found, logprobs=rollouts.logprobs)

    return corrected


UNCLIPPED = {"clip_low": 1.0, "clip_high": torch.inf}


def kl(**fields: Any) -> Callable[[Answer], Answer]:
    return ours(ClippedSurrogate(**CLIP), RolloutMean(), penalty=KL(weight=0.1, **fields))


OURS: dict[str, Callable[[Answer], Answer]] = {
    "uniform": advantage(Uniform()),
    "uniform, no std": advantage(Uniform(divide_by_std=False)),
    "leave one out": advantage(LeaveOneOut()),
    "group baseline": advantage(GroupBaseline()),
    "clipped, token mean": ours(ClippedSurrogate(**CLIP), TokenMean()),
    "clipped, rollout mean": ours(ClippedSurrogate(**CLIP), RolloutMean()),
    "clipped, constant": ours(ClippedSurrogate(**CLIP), Constant(length=T)),
    "sequence ratio, geometric": ours(SequenceSurrogate(ratio="geometric", **CLIP), RolloutMean()),
    "cispo, upper bound": ours(Cispo(clip_high=0.28), TokenMean()),
    "cispo, both bounds": ours(Cispo(**CLIP), TokenMean()),
    "sapo": ours(Sapo(), RolloutMean()),
    "dppo, total variation": ours(Dppo(cap=1.5, anchor="pi_old"), TokenMean()),
    "dppo, kl": ours(Dppo(divergence="kl", cap=1.5, anchor="pi_old"), TokenMean()),
    "gmpo": ours(Gmpo(), RolloutMean()),
    "clip-cov, all candidates": ours(
        ClippedSurrogate(**UNCLIPPED), TokenMean(), of_current(ClipCov(share=1.0, low=0.2))
    ),
    "kl-cov": ours(ClippedSurrogate(**UNCLIPPED), TokenMean(), of_current(KLCov(share=0.1)), KLCovPenalty()),
    "kl penalty, k1": kl(value="k1", gradient="k1"),
    "kl penalty, k2": kl(value="k2", gradient="k2"),
    "kl penalty, k3": kl(value="k3", gradient="k3"),
    "kl penalty, value k3, gradient k2": kl(value="k3", gradient="k2"),
    "forking tokens": ours(ClippedSurrogate(**CLIP), TokenMean(), ForkingTokens(share=0.2)),
    "truncated importance": ours(ClippedSurrogate(**CLIP), TokenMean(), TruncatedImportance(cap=2.0)),
    "entropy bonus": ours(ClippedSurrogate(**CLIP), TokenMean(), penalty=EntropyBonus(weight=0.05)),
    "a fully masked row, rollout mean": ours(ClippedSurrogate(**CLIP), RolloutMean(), masked_row=True),
}


def apart(mine: Answer, theirs: Answer) -> float:
    return max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)


def asked(peer: str, python: str, cases: Path, folder: Path) -> dict:
    answers = folder / f"{peer}.pt"
    more = [str(SHIPPED / "tiny")] if peer == "trl" else []
    done = subprocess.run([python, HERE / f"{peer}_side.py", cases, answers, *more], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stderr[-3000:]}")
    return torch.load(answers)


def whole_step(step: Answer) -> float:
    """TRL's advantages of a real step, from its rewards; its eps is 1e-4."""
    rewards, group = step["rewards"], torch.arange(len(step["rewards"])) // 4
    mask = torch.ones(len(rewards), 1, dtype=torch.bool)
    mine = Uniform(eps=1e-4)(build_rollouts(mask=mask, rewards=rewards, group=group))[:, 0]
    return float((mine - step["advantages"].flatten()).abs().max())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trl", required=True, help="the python of an environment with trl==1.16.0")
    arguments.add_argument("--verl", required=True, help="the python of an environment with verl==0.9.1")
    options = arguments.parse_args()
    cases = [inputs(seed) for seed in range(SEEDS)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.pt"
        torch.save(cases, file)
        pythons = {"TRL": options.trl, "verl": options.verl}
        answers = {p: asked(p.lower(), python, file, Path(folder)) for p, python in track(pythons.items(), "asking")}
    lines = ["| what | against TRL | against verl |", "|---|---|---|"]
    failed = []
    for name, of_ours in OURS.items():
        row = [name]
        for peer, answer in answers.items():
            if name not in answer["cases"][0]:
                row.append("")
                continue
            worst = max(apart(of_ours(case), theirs[name]) for case, theirs in zip(cases, answer["cases"], strict=True))
            known = DIFFERENCES.get((name, peer))
            if (worst <= TOLERANCE) == (known is not None):
                failed.append(f"{name} against {peer}: {worst:.1e}" + (", which is said to differ" if known else ""))
            row.append(f"{worst:.0e}" if known is None else f"**{worst:.2g}**: {known}")
        lines.append(f"| {' | '.join(row)} |")
    step = whole_step(answers["TRL"]["step"])
    if step > TOLERANCE:
        failed.append(f"the advantages of TRL's whole step: {step:.1e}")
    lines.append(f"| uniform with eps 1e-4, in a whole step of GRPOTrainer | {step:.0e} | |")
    PAGE.write_text(page(lines))
    print("\n".join(lines))
    if failed:
        raise SystemExit("no agreement:\n" + "\n".join(failed))


def page(lines: list[str]) -> str:
    return f"""# Against TRL and verl

`make oracle` installs trl 1.16.0 and verl 0.9.1, each in a separate environment, and writes this page. It compares the value of each loss,
its gradient with respect to the log-probabilities, and each advantage with the results of TRL's and verl's own functions.

The inputs are {SEEDS} random ragged batches in float64: {GROUPS} groups of {G} rows, 1 to {T} tokens, rewards from 0, 0.1, 0.35 and 1, one
group of equal rewards. The numbers are the largest absolute difference. `make oracle` fails if one is above {TOLERANCE:.0e}, unless the
page explains the difference.

{chr(10).join(lines)}
{NOT_COMPARED}"""


if __name__ == "__main__":
    main()
