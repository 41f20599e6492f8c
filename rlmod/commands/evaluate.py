"""``rlmod-eval policy=hf policy.path=... data.validation_path=test.jsonl``, or ``rlmod-eval completions=FILE.jsonl output=OUT.jsonl``.

The first evaluates a policy on held-out problems; the second scores recorded completions, without a model.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod import jsonl
from rlmod.config import cli

log = logging.getLogger(__name__)

Z = 1.959964  # of a 95 % interval


def evaluate(cfg: DictConfig) -> float:
    """Run the command; return mean@n, or the mean reward of recorded completions."""
    summary = run(cfg)
    if cfg.completions is not None:
        return summary["mean_reward"]
    return summary[f"mean@{cfg.sampler.completions_per_prompt}"]["value"]


def evaluate_from_python(overrides: Sequence[str] | DictConfig = ()) -> dict[str, Any]:
    """Evaluate as ``rlmod-eval OVERRIDES`` does; return the summary (summary.json), with its ``folder``.

    With ``completions=FILE`` it returns ``mean_reward``, ``completions`` and ``output``. ValueError for what the command would refuse.
    """
    return run(overrides if isinstance(overrides, DictConfig) else cli.compose("eval", overrides))


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate a policy, or compute the rewards of recorded completions; return the summary."""
    from rlmod.config.build import build_reward

    logging.captureWarnings(True)
    reward = build_reward(cfg.reward)
    if cfg.completions is not None:
        return _score_file(Path(cfg.completions), reward, cfg.output)
    return _evaluate_policy(cfg, reward)


def _score_file(source: Path, reward: Any, output: str | None) -> dict[str, Any]:
    """Add ``reward`` (and its named terms) to each line; the output is written completely or not at all."""
    from rlmod.reward._compute import compute_rewards
    from rlmod.types import Texts

    if output is None or Path(output).suffix != ".jsonl":
        raise ValueError(f"output must name a .jsonl file to write, as output=OUT.jsonl, got {output}")
    target = Path(output)
    if target.resolve() == source.resolve():
        raise ValueError(f"output={output} is the file that is read: give another")
    located = list(_recorded(source))
    records = [record for _, record in located]
    texts = Texts(completions=[r["completion"] for r in records], answers=[_text(r["answer"]) for r in records])
    try:
        rewards, terms, _ = compute_rewards(reward, texts)
    except ValueError as error:
        raise ValueError(f"{_culprit(reward, located) or source}: {error}") from error
    for row, record in enumerate(records):
        record["reward"] = float(rewards[row])
        if terms:
            record["terms"] = {name: float(values[row]) for name, values in terms.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{target.name}")
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    os.replace(partial, target)
    mean = float(rewards.mean())
    print(f"mean reward {mean:.4f} of {len(records)} completions; {target}")
    return {"mean_reward": mean, "completions": len(records), "output": str(target)}


def _culprit(reward: Any, located: list[tuple[str, dict[str, Any]]]) -> str | None:
    """The line that the reward refuses; None where it takes each by itself."""
    from rlmod.reward._compute import compute_rewards
    from rlmod.types import Texts

    for where, record in located:
        try:
            compute_rewards(reward, Texts(completions=[record["completion"]], answers=[_text(record["answer"])]))
        except ValueError:
            return where
    return None


def _recorded(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not source.is_file():
        raise ValueError(f"completions={source}: there is no such file; relative paths start at {Path.cwd()}")
    found = False
    for where, record in jsonl.objects(source):
        for field in ("completion", "answer"):
            if field not in record:
                raise ValueError(f"{where}: no field {field}; it has {', '.join(record) or 'none'}")
        if not isinstance(record["completion"], str):
            raise ValueError(f"{where}: completion must be text, got {type(record['completion']).__name__}")
        if not isinstance(record["answer"], str | int | float) or isinstance(record["answer"], bool):
            raise ValueError(f"{where}: answer must be text or a number, got {record['answer']!r}")
        if isinstance(record["answer"], float) and not math.isfinite(record["answer"]):
            raise ValueError(f"{where}: answer must be a finite number, got {record['answer']}")
        found = True
        yield where, record
    if not found:
        raise ValueError(f"completions={source}: the file holds no line")


def _text(answer: str | int | float) -> str:
    """Numbers without artefacts: 27.0 is 27."""
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()


def _evaluate_policy(cfg: DictConfig, reward: Any) -> dict[str, Any]:
    from rlmod.config.sizes import check_seed
    from rlmod.config.validation import check_types, check_value
    from rlmod.interfaces import prepare
    from rlmod.model.policy import HFPolicy

    n = cfg.sampler.completions_per_prompt
    check_seed(cfg.seed, "seed")
    check_seed(cfg.run_seed, "run_seed")
    check_value(cfg.pass_at, Sequence[int], "pass_at")
    check_value(cfg.threshold, float, "threshold")
    check_value(cfg.prompts_per_batch, int, "prompts_per_batch")
    if cfg.prompts_per_batch < 1:
        raise ValueError(f"prompts_per_batch must be at least 1, got {cfg.prompts_per_batch}")
    device = _device(cfg.device)
    for k in cfg.pass_at:
        if not 1 <= k <= n:
            raise ValueError(f"pass_at holds {k}, but k must be between 1 and sampler.completions_per_prompt = {n}")
    for key in ("policy", "sampler"):
        check_types(cfg[key], key)
    sampler = instantiate(cfg.sampler)
    specification: HFPolicy = instantiate(cfg.policy)
    folder = Path(cfg.output or f"runs/eval/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    problems = instantiate(cfg.data.validation, _convert_="all")()
    cli.quiet()
    tokenizer = specification.tokenizer()
    encoded = instantiate(cfg.data.encoder).encode(problems, tokenizer)
    prepare([sampler, reward], encoded.problems, tokenizer)
    encoded.check_max_model_len(sampler, "sampler")
    policy: Any = specification.model(tokenizer).eval()
    policy.to(device)
    samples = _sampled(cfg, policy, tokenizer, encoded, sampler, reward, device, folder / "samples.jsonl")
    return _summary(samples, n, cfg, encoded.dropped, folder)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name}: {str(error).splitlines()[0]}; give auto, cpu, or a device that is here"
        ) from error
    return name


def _sampled(
    cfg: DictConfig, policy: Any, tokenizer: Any, encoded: Any, sampler: Any, reward: Any, device: str, file: Path
) -> list[dict[str, Any]]:
    """Sample and grade batch by batch, as validation does while training; write every completion as it comes."""
    from rich.progress import track

    from rlmod.config.sizes import Validation
    from rlmod.interfaces import sync
    from rlmod.model.policy import completion_texts
    from rlmod.rollout.validation import sample_and_grade, validation_seed

    samples: list[dict[str, Any]] = []
    settings = Validation(sampler=sampler, reward=reward, threshold=cfg.threshold)
    sync(sampler, policy)
    starts = range(0, len(encoded.problems), cfg.prompts_per_batch)
    with file.open("w", encoding="utf-8") as stream:
        for batch, start in enumerate(track(starts, description="evaluating")):
            stop = min(start + cfg.prompts_per_batch, len(encoded.problems))
            graded = sample_and_grade(
                policy,
                encoded.batch(range(start, stop)).to(device),
                settings,
                decode=lambda rows: completion_texts(tokenizer, rows),
                seed=validation_seed(cfg.run_seed, cfg.seed, batch),
            )
            texts = graded.texts
            for row, problem in enumerate(texts.problems or ()):
                sample = {
                    "source": problem.source,
                    "prompt": problem.prompt,
                    "answer": problem.answer,
                    "completion": texts.completions[row],
                    "reward": float(graded.rewards[row]),
                    "correct": bool(graded.correct[row]),
                    "truncated": (texts.truncated or ())[row],
                    "length": (texts.lengths or ())[row],
                }
                if cfg.record_tokens:
                    sample |= _tokens(graded.rollouts, row)
                samples.append(sample)
                stream.write(json.dumps(sample, ensure_ascii=False) + "\n")
            stream.flush()
    return samples


def _tokens(rollouts: Any, row: int) -> dict[str, Any]:
    """Return the fields that guide=demonstrations reads beyond the text: tokens and their log-probabilities."""
    if rollouts.logprobs is None:
        raise ValueError("record_tokens=true: this sampler gives no log-probabilities; use sampler=hf")
    length = int(rollouts.mask[row].sum())
    return {
        "completion_ids": rollouts.completion_ids[row, :length].tolist(),
        "logprobs": rollouts.logprobs[row, :length].tolist(),
    }


def _summary(samples: list[dict[str, Any]], n: int, cfg: DictConfig, dropped: int, folder: Path) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from rich.table import Table

    from rlmod.training.metrics import pass_at_k

    correct = torch.tensor([sample["correct"] for sample in samples]).view(-1, n)
    values = {f"mean@{n}": correct.double().mean(1)} | {f"pass@{k}": pass_at_k(correct, k) for k in cfg.pass_at}
    summary: dict[str, Any] = {"problems": len(correct), "completions_per_problem": n, "dropped_problems": dropped}
    table = Table("metric", "value", "95 % interval", title=f"{cfg.policy.path} on {len(correct)} problems")
    for name, of_problem in values.items():
        low, high = interval(of_problem.tolist())
        summary[name] = {"value": float(of_problem.mean()), "interval": [low, high]}
        table.add_row(name, f"{float(of_problem.mean()):.4f}", f"{low:.4f} to {high:.4f}")
    summary["length"] = sum(sample["length"] for sample in samples) / len(samples)
    summary["truncated"] = sum(sample["truncated"] for sample in samples) / len(samples)
    if summary["truncated"] == 1:
        log.warning(
            "100 %% of the %d completions hit the limit of %d tokens before an end of sequence: raise sampler.max_new_tokens",
            len(samples),
            cfg.sampler.max_new_tokens,
        )
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    Console().print(table)
    print(f"mean length {summary['length']:.1f} tokens, {summary['truncated']:.1%} truncated; {folder}")
    return {**summary, "folder": str(folder)}


def interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval for the mean of per-problem values in [0, 1].

    Problems are the units, since completions of one problem are not independent: Wilson's interval for the mean p. Values of 0 and 1, as
    of one completion a problem, count as n problems; others, which vary less, as so many more as p (1 - p) is larger than their variance.
    That is taken with two problems at 0 and two at 1 besides (Agresti and Coull's): near 0 and 1 hardly any values differ, and would claim
    to know what they do not. So 0 of 30 does not claim to be exactly 0, nor a mean just below 1 to be surer than 1 itself.
    """
    p = sum(values) / len(values)
    more = [*values, 0.0, 0.0, 1.0, 1.0]
    q = sum(more) / len(more)
    effective = q * (1 - q) / (sum((v - q) ** 2 for v in more) / len(more)) * len(more) - 4
    middle = (p + Z**2 / (2 * effective)) / (1 + Z**2 / effective)
    half = Z / (1 + Z**2 / effective) * math.sqrt(p * (1 - p) / effective + Z**2 / (4 * effective**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def main() -> None:
    cli.run(evaluate, "eval")


if __name__ == "__main__":
    main()
