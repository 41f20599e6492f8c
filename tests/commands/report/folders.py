"""Folders as runs leave them, whole or not, and what a reader sees of their pages."""

import json
import re
from pathlib import Path

from rlmod.commands import report

CONFIG = """
seed: 7
policy: {_target_: rlmod.model.policy.pretrained, path: policies/tiny/arithmetic}
shaper: {_target_: rlmod.shaper.token_entropy.TokenEntropy, alpha2: 0.1}
loss: {_target_: rlmod.loss.clipped_surrogate.ClippedSurrogate}
aggregation: {_target_: rlmod.aggregation.token_mean.TokenMean}
reward:
  _target_: rlmod.reward.weighted.Weighted
  terms: [{_target_: rlmod.reward.exact_match.ExactMatch}, {_target_: rlmod.reward.format.Format}]
"""
METRICS = """epoch,step,reward/mean,completions/entropy,val/mean@1,val/mean@16,val/pass@16
0,0,,,0.42,0.40,0.80
0,1,0.40,0.6,,,
1,2,0.60,0.5,,,
1,2,,,0.97,0.93,1.0
2,3,0.90,0.4,,,
2,3,,,0.95,0.94,0.99
"""
RESULT = {
    "held_out": {"before": 0.42, "after": 0.95, "metric": "val/mean@1", "problems": 512},
    "seconds": {"training": 200.0, "total": 230.0},
    "steps": 3,
    "tokens": 123456,
    "seed": 7,
    "versions": {"torch": "2.13.0"},
    "completed": True,
}


def sample(step: int, when: str, prompt: str, completion: str, reward: float, **more: object) -> dict[str, object]:
    shared = {"answer": "4", "truncated": False, "length": len(completion)}
    return {"step": step, "when": when, "prompt": prompt, "completion": completion, "reward": reward} | shared | more


SAMPLES = [
    sample(0, "validation", "2+2?", "five", 0.0),
    sample(0, "validation", "1+3?", "four", 1.0),
    sample(3, "validation", "2+2?", "2+2=4", 1.0),
    sample(3, "validation", "1+3?", "1+3=4", 1.0, truncated=True),
    sample(1, "train", "0+4?", "<b>4", 1.0, tokens=["<b>", "4"], entropy=[0.5, 0.25], advantages=[1.5, 0.5]),
    sample(1, "train", "4+0?", "no", 0.0, tokens=["no"], entropy=[0.1], advantages=[-2.0]),
    sample(3, "train", "3+1?", "4", 1.0, tokens=["4"], entropy=[0.2, 0.3], advantages=[1.0]),
]


def write_run(
    folder: Path,
    *,
    metrics: str = METRICS,
    config: str | None = CONFIG,
    result: dict[str, object] | None = RESULT,
    samples: list[dict[str, object]] | None = SAMPLES,
    overrides: list[str] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(metrics)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    if overrides is not None:
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides))
    return folder


def page_of(folder: Path) -> str:
    return report.write_report(folder).read_text()


def text_of(page: str) -> str:
    """Return the text that a reader sees, without tags, on one line."""
    body = page.split("</style>")[1]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)).replace("&#39;", "'")
