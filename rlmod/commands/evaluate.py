"""Evaluate a policy, or compute the rewards of recorded completions.

``rlmod-eval policy=hf policy.path=... data.validation_path=test.jsonl`` evaluates a policy on held-out problems.
``rlmod-eval completions=FILE.jsonl output=OUT.jsonl`` computes the rewards of recorded completions, without a model.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod import jsonl
from rlmod.config import cli

log = logging.getLogger(__name__)

Z = 1.959964  # standard normal quantile of a 95 % interval


def evaluate(cfg: DictConfig) -> float:
    """Run the command; return mean@n, or the mean reward of recorded completions."""
    summary = run(cfg)
    if cfg.completions is not None:
        return summary["mean_reward"]
    return summary[f"mean@{cfg.sampler.completions_per_prompt}"]["value"]


def evaluate_from_python(overrides: Sequence[str] | DictConfig = ()) -> dict[str, Any]:
    """Evaluate as ``rlmod-eval OVERRIDES`` does; return the summary (summary.json), with its ``folder``.

    With ``completions=FILE`` return ``mean_reward``, ``completions`` and ``output``. Raise ValueError for what the command would refuse.
    """
    with cli.mistakes_as_value_errors():
        return run(cli.compose("eval", overrides))


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate a policy, or compute the rewards of recorded completions; return the summary."""
    from rlmod.config.build import build_reward

    logging.captureWarnings(True)
    reward = build_reward(cfg.reward)
    if cfg.completions is not None:
        return _write_rewards(Path(cfg.completions), reward, cfg.output, cfg.column)
    return _evaluate_policy(cfg, reward)


def _write_rewards(source: Path, reward: Any, output: str | None, column: str) -> dict[str, Any]:
    """Add the reward, as ``column``, and its named terms to each line, and return the summary.

    The output is written completely or not at all. A completion from which the reward abstains gets null.
    """
    from rlmod.reward._compute import compute_rewards
    from rlmod.reward._failures import check_failure_shares, failure_metrics
    from rlmod.types import Texts

    if output is None or Path(output).suffix != ".jsonl":
        raise ValueError(f"output must name a .jsonl file to write, as output=OUT.jsonl, got {output}")
    target = Path(output)
    if target.resolve() == source.resolve():
        raise ValueError(f"output={output} is the input file: give another path")
    located = list(_read_completions(source))
    _check_columns(located, column)
    records = [record for _, record in located]
    texts = Texts(completions=[r["completion"] for r in records], answers=[_answer_text(r["answer"]) for r in records])
    try:
        result = compute_rewards(reward, texts)
    except ValueError as error:
        raise ValueError(f"{_find_refused_line(reward, located) or source}: {error}") from error
    check_failure_shares(result)
    for row, record in enumerate(records):
        none = bool(result.abstained[row])
        record[column] = None if none else float(result.rewards[row])
        if result.terms:
            numbers = {name: None if none else float(values[row]) for name, values in result.terms.items()}
            record[terms_column(column)] = numbers
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".partial-{target.name}")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    unfinished.write_text(lines, encoding="utf-8")
    os.replace(unfinished, target)
    failures = {name: int(number) for name, number in failure_metrics([result.failed], result.abstained).items()}
    counted = result.rewards[~result.abstained]
    mean = float(counted.mean()) if len(counted) else None
    said = "".join(f", {number} {name.removeprefix('failures/')}" for name, number in failures.items() if number)
    print(f"mean reward {'-' if mean is None else f'{mean:.4f}'} of {len(counted)} completions{said}; {target}")
    summary = {"mean_reward": mean, "completions": len(records), "without_reward": len(records) - len(counted)}
    return {**summary, **failures, "output": str(target)}


def terms_column(column: str) -> str:
    """Return the name of the column of named terms beside ``column``."""
    return "terms" if column == "reward" else f"{column}_terms"


def _check_columns(located: list[tuple[str, dict[str, Any]]], column: str) -> None:
    for where, record in located:
        for name in (column, terms_column(column)):
            if name in record:
                raise ValueError(
                    f"{where}: there is a field {name} already, which would be overwritten; name another one, as column=my_{column}"
                )


def _find_refused_line(reward: Any, located: list[tuple[str, dict[str, Any]]]) -> str | None:
    """Return the location of the first line that the reward refuses; None if it accepts each line alone."""
    from rlmod.reward._compute import compute_rewards
    from rlmod.types import Texts

    for where, record in located:
        try:
            compute_rewards(reward, Texts(completions=[record["completion"]], answers=[_answer_text(record["answer"])]))
        except ValueError:
            return where
    return None


def _read_completions(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location and the record of each line. Raise ValueError for a missing file or an invalid line."""
    if not source.is_file():
        raise ValueError(f"completions={source}: there is no such file; relative paths start at {Path.cwd()}")
    found = False
    for where, record in jsonl.read_objects(source):
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
        raise ValueError(f"completions={source}: the file is empty")


def _answer_text(answer: str | int | float) -> str:
    """Return the answer as text; a float that is a whole number has no decimals (27.0 is 27)."""
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()


def _evaluate_policy(cfg: DictConfig, reward: Any) -> dict[str, Any]:
    from rlmod.config.build import check_completion_prefix, find_unreadable, unreadable_answer
    from rlmod.config.sizes import check_seed
    from rlmod.config.validation import check_types, check_value
    from rlmod.data._large import load_problems
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
    device, unreadable = _resolve_device(cfg.device), unreadable_answer(cfg)
    for k in cfg.pass_at:
        if not 1 <= k <= n:
            raise ValueError(f"pass_at holds {k}, but k must be between 1 and sampler.completions_per_prompt = {n}")
    if cfg.data.validation is None:
        raise ValueError(
            "data.validation=null: rlmod-eval samples completions of these problems; give data.validation_path=FILE"
        )
    for key in ("policy", "sampler"):
        check_types(cfg[key], key)
    sampler = instantiate(cfg.sampler)
    specification: HFPolicy = instantiate(cfg.policy)
    folder = Path(cfg.output or f"runs/eval/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    problems = load_problems(instantiate(cfg.data.validation, _convert_="all"))
    cli.silence_libraries()
    tokenizer = specification.tokenizer()
    encoded = instantiate(cfg.data.encoder, _convert_="all").encode(problems, tokenizer)
    encoded = encoded.without_unreadable(find_unreadable(encoded, reward), unreadable)
    prepare([sampler, reward], encoded.problems, tokenizer)
    check_completion_prefix(reward, encoded, tokenizer)
    encoded.check_max_model_len(sampler, "sampler")
    policy: Any = specification.model(tokenizer).eval()
    policy.to(device)
    samples = _sample_and_write(cfg, policy, tokenizer, encoded, sampler, reward, device, folder / "samples.jsonl")
    return _summarize(samples, n, cfg, encoded.dropped, folder)


def _resolve_device(name: str) -> str:
    """Return the device for ``device=NAME``. Raise ValueError if it is not available."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name}: {str(error).splitlines()[0]}; use auto, cpu, or an available device"
        ) from error
    return name


def _sample_and_write(
    cfg: DictConfig, policy: Any, tokenizer: Any, encoded: Any, sampler: Any, reward: Any, device: str, file: Path
) -> list[dict[str, Any]]:
    """Sample and grade batch by batch, as the validation of a training run does. Each batch is written as soon as it is graded."""
    from rich.progress import track

    from rlmod.config.sizes import Validation
    from rlmod.interfaces import declared, sync
    from rlmod.model.policy import completion_texts
    from rlmod.rollout.validation import sample_and_grade, validation_seed

    samples: list[dict[str, Any]] = []
    skip = bool(declared(reward, "skip_special_tokens"))
    decode = partial(completion_texts, tokenizer, skip_special_tokens=skip, stop=getattr(sampler, "stop", ()))
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
                decode=decode,
                seed=validation_seed(cfg.run_seed, cfg.seed, batch),
            )
            texts = graded.texts
            for row, problem in enumerate(texts.problems or ()):
                sample = {
                    "source": problem.source,
                    "prompt": problem.prompt,
                    "answer": problem.answer,
                    "completion": texts.completions[row],
                    "reward": None if graded.abstained[row] else float(graded.rewards[row]),
                    "correct": None if graded.abstained[row] else bool(graded.correct[row]),
                    "truncated": (texts.truncated or ())[row],
                    "length": (texts.lengths or ())[row],
                }
                if cfg.record_tokens:
                    sample |= _token_fields(graded.rollouts, row)
                samples.append(sample)
                stream.write(json.dumps(sample, ensure_ascii=False) + "\n")
            stream.flush()
    return samples


def _token_fields(rollouts: Any, row: int) -> dict[str, Any]:
    """Return the fields that guide=demonstrations reads beyond the text: tokens and their log-probabilities."""
    if rollouts.logprobs is None:
        raise ValueError(
            "record_tokens=true needs log-probabilities, which this sampler does not return; use sampler=hf"
        )
    length = int(rollouts.mask[row].sum())
    return {
        "completion_ids": rollouts.completion_ids[row, :length].tolist(),
        "logprobs": rollouts.logprobs[row, :length].tolist(),
    }


def _summarize(samples: list[dict[str, Any]], n: int, cfg: DictConfig, dropped: int, folder: Path) -> dict[str, Any]:
    """Print and write the metrics (summary.json), and return them with the folder."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from rlmod.training.accuracy import pass_at_k

    counted = torch.tensor([sample["correct"] is not None for sample in samples]).view(-1, n)
    correct = torch.tensor([bool(sample["correct"]) for sample in samples]).view(-1, n)
    # A problem without a reward for any of its completions is left out: 0 / 0 is NaN.
    values = {f"mean@{n}": correct.double().sum(1) / counted.sum(1)}
    values |= {f"pass@{k}": pass_at_k(correct, k, counted) for k in cfg.pass_at}
    summary: dict[str, Any] = {"problems": len(correct), "completions_per_problem": n, "dropped_problems": dropped}
    summary["completions_without_reward"] = int((~counted).sum())
    without = summary["completions_without_reward"]
    table = Table("metric", "value", "95 % interval", title=f"{cfg.policy.path} on {len(correct)} problems")
    for name, per_problem in values.items():
        per_problem = per_problem[~per_problem.isnan()]
        if not len(per_problem):
            raise ValueError(
                f"{name} cannot be computed: the reward abstained from too many completions of every problem"
            )
        low, high = interval(per_problem.tolist())
        summary[name] = {"value": float(per_problem.mean()), "interval": [low, high]}
        table.add_row(name, f"{float(per_problem.mean()):.4f}", f"{low:.4f} to {high:.4f}")
    summary["length"] = sum(sample["length"] for sample in samples) / len(samples)
    summary["truncated"] = sum(sample["truncated"] for sample in samples) / len(samples)
    if summary["truncated"] == 1:
        log.warning(
            "100 %% of the %d completions reached the limit of %d tokens before the end of sequence: raise sampler.max_new_tokens",
            len(samples),
            cfg.sampler.max_new_tokens,
        )
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    Console().print(table)
    print(f"mean length {summary['length']:.1f} tokens, {summary['truncated']:.1%} truncated; {folder}")
    if without:
        print(f"the reward abstained from {without} of {len(samples)} completions, which do not count")
    return {**summary, "folder": str(folder)}


def interval(values: list[float]) -> tuple[float, float]:
    """Return a 95 % interval for the mean of per-problem values in [0, 1]: Wilson's interval for the mean p.

    The units are problems, because completions of one problem are not independent. n problems with values of 0 and 1, as with one
    completion per problem, count as n. Other values vary less and count as more: (n + 4) q (1 - q) / variance - 4. Here the mean q and the
    variance include two additional problems at 0 and two at 1 (Agresti and Coull), because near 0 and 1 almost all values are equal and
    the variance alone is too small. Thus the interval of 0 of 30 is wider than 0, and a mean just below 1 has no narrower interval than 1.
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
