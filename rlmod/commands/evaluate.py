"""Evaluate a policy, or compute the rewards of recorded completions.

``rlmod-eval policy=hf policy.path=... data.validation_path=test.jsonl`` evaluates a policy on held-out problems.
``rlmod-eval policy=hf policy.path=... benchmark=[aime24,math500]`` evaluates it on named sets.
``rlmod-eval completions=FILE.jsonl output=OUT.jsonl`` computes the rewards of recorded completions, without a model.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod.commands.recordings import answer_of, read_recordings
from rlmod.config import cli

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> float:
    """Run the command; return mean@n, of the first benchmark if there are any, or the mean reward of recorded completions."""
    summary = run(cfg)
    if cfg.completions is not None:
        return summary["mean_reward"]
    if cfg.get("benchmark"):
        first = next(iter(summary["benchmarks"].values()))
        return first[f"mean@{first['completions_per_problem']}"]["value"]
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
    located = read_recordings(source)
    _check_columns(located, column)
    records = [record for _, record in located]
    texts = Texts(
        completions=[record["completion"] for record in records], answers=[answer_of(record) for record in records]
    )
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
            compute_rewards(reward, Texts(completions=[record["completion"]], answers=[answer_of(record)]))
        except ValueError:
            return where
    return None


def _evaluate_policy(cfg: DictConfig, reward: Any) -> dict[str, Any]:
    """Sample and grade each set, and return the summary: of the held-out problems, or of each benchmark by name."""
    from rlmod.config.build import check_completion_prefix, find_unreadable, unreadable_answer
    from rlmod.config.validation import check_types
    from rlmod.data._large import load_problems
    from rlmod.interfaces import prepare
    from rlmod.model.policy import HFPolicy, positions

    _check_settings(cfg)
    device, unreadable = _resolve_device(cfg.device), unreadable_answer(cfg)
    for key in ("policy", "sampler"):
        check_types(cfg[key], key)
    sampler = instantiate(cfg.sampler)
    sources, settings = _sets(cfg, sampler, reward)
    specification: HFPolicy = instantiate(cfg.policy)
    folder = Path(cfg.output or f"runs/eval/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    problems = {name: _naming(name, partial(load_problems, source)) for name, source in sources.items()}
    cli.silence_libraries()
    tokenizer = specification.tokenizer()
    encoder = instantiate(cfg.data.encoder, _convert_="all")

    def encode(problems: Any) -> Any:
        found = encoder.encode(problems, tokenizer)
        found = found.without_unreadable(find_unreadable(found, reward), unreadable)
        check_completion_prefix(reward, found, tokenizer)
        found.check_max_model_len(sampler, "sampler")
        found.check_positions(positions(specification.shape()), sampler, "sampler")
        return found

    encoded: dict[str, Any] = {}
    for name, each in problems.items():
        encoded[name] = _naming(name, partial(encode, each))
    prepare([sampler, reward], [problem for each in encoded.values() for problem in each.problems], tokenizer)
    policy: Any = specification.model(tokenizer).eval()
    policy.to(device)
    sampled = _sample_and_write(cfg, policy, tokenizer, encoded, settings, device, folder / "samples.jsonl")
    summaries = {
        name: _summarize(samples, settings[name], cfg, encoded[name].dropped) for name, samples in sampled.items()
    }
    summary = {"benchmarks": summaries} if cfg.get("benchmark") else summaries[""]
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"results: {folder}")
    return {**summary, "folder": str(folder)}


def _check_settings(cfg: DictConfig) -> None:
    """Raise ValueError that names the key for a value that cannot be right."""
    from rlmod.config.sizes import check_seed
    from rlmod.config.validation import check_value

    n = cfg.sampler.completions_per_prompt
    check_seed(cfg.seed, "seed")
    check_seed(cfg.run_seed, "run_seed")
    check_value(cfg.threshold, float, "threshold")
    check_value(cfg.prompts_per_batch, int, "prompts_per_batch")
    if cfg.prompts_per_batch < 1:
        raise ValueError(f"prompts_per_batch must be at least 1, got {cfg.prompts_per_batch}")
    for name in ("pass_at", "maj_at", "best_at"):
        check_value(cfg[name], Sequence[int], name)
        for k in cfg[name]:
            if not cfg.get("benchmark") and not 1 <= k <= n:
                raise ValueError(f"{name} holds {k}, but k must be between 1 and sampler.completions_per_prompt = {n}")
    if cfg.data.validation is None and not cfg.get("benchmark"):
        raise ValueError(
            "data.validation=null: rlmod-eval samples completions of these problems; give data.validation_path=FILE, or "
            "benchmark=[NAME]"
        )


def _sets(cfg: DictConfig, sampler: Any, reward: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the problems and the settings of each set by name; "" is data.validation, which benchmarks replace."""
    from rlmod.config.benchmarks import build_benchmarks
    from rlmod.config.build import build_problems
    from rlmod.config.sizes import Validation

    numbers: dict[str, Any] = {name: tuple(cfg[name]) for name in ("pass_at", "maj_at", "best_at")}
    shared = {"sampler": sampler, "reward": reward, "threshold": cfg.threshold}
    if not cfg.get("benchmark"):
        problems = instantiate(cfg.data.validation, _convert_="all")
        try:
            return {"": problems}, {"": Validation(**shared, **numbers)}
        except ValueError as error:  # these are keys of validation in a run
            raise ValueError(str(error).removeprefix("validation.")) from error
    # The numbers are for the benchmarks: a set of another number of completions does not have to allow them.
    return build_benchmarks(cfg.get("benchmark"), Validation(**shared), build_problems, numbers)


def _naming(name: str, task: Callable[[], Any]) -> Any:
    """Return the task's result; a ValueError names the benchmark, if it is one."""
    from rlmod.config.benchmarks import naming_benchmark

    with naming_benchmark(name) if name else nullcontext():
        return task()


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
    cfg: DictConfig,
    policy: Any,
    tokenizer: Any,
    encoded: Mapping[str, Any],
    sets: Mapping[str, Any],
    device: str,
    file: Path,
) -> dict[str, list[dict[str, Any]]]:
    """Sample and grade batch by batch, as the validation of a training run does. Each batch is written as soon as it is graded."""
    from rich.progress import track

    from rlmod.interfaces import declared, sync
    from rlmod.model.policy import completion_texts
    from rlmod.rollout.validation import one_per_engine, sample_and_grade, validation_seed

    sampled: dict[str, list[dict[str, Any]]] = {name: [] for name in encoded}
    for sampler in one_per_engine(settings.sampler for settings in sets.values()):
        sync(sampler, policy)
    size = cfg.prompts_per_batch
    batches = [(name, start) for name, problems in encoded.items() for start in range(0, len(problems), size)]
    with file.open("w", encoding="utf-8") as stream:
        for name, start in track(batches, description="evaluating"):
            settings, problems = sets[name], encoded[name]
            skip = bool(declared(settings.reward, "skip_special_tokens"))
            stop = getattr(settings.sampler, "stop", ())
            graded = sample_and_grade(
                policy,
                problems.batch(range(start, min(start + size, len(problems)))).to(device),
                settings,
                decode=partial(completion_texts, tokenizer, skip_special_tokens=skip, stop=stop),
                seed=validation_seed(cfg.run_seed, cfg.seed, start // size),
            )
            for row in range(len(graded.texts)):
                sample = _sample_fields(graded, row, name, cfg.record_tokens)
                sampled[name].append(sample)
                stream.write(json.dumps(sample, ensure_ascii=False) + "\n")
            stream.flush()
    return sampled


def _sample_fields(graded: Any, row: int, name: str, record_tokens: bool) -> dict[str, Any]:
    """Return the line of samples.jsonl for a completion."""
    texts = graded.texts
    problem = texts.problems[row]
    sample = {
        **({"benchmark": name} if name else {}),
        "source": problem.source,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "completion": texts.completions[row],
        "reward": None if graded.abstained[row] else float(graded.rewards[row]),
        "correct": None if graded.abstained[row] else bool(graded.correct[row]),
        "truncated": (texts.truncated or ())[row],
        "length": (texts.lengths or ())[row],
    }
    if graded.answers:
        sample["final_answer"] = graded.answers[row]
    return sample | _token_fields(graded.rollouts, row) if record_tokens else sample


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


def _summarize(samples: list[dict[str, Any]], settings: Any, cfg: DictConfig, dropped: int) -> dict[str, Any]:
    """Print and return the metrics of a set."""
    from rich.console import Console
    from rich.table import Table

    from rlmod.training.accuracy import interval

    n, counted, values = _per_problem(samples, settings)
    name = settings.benchmark
    summary: dict[str, Any] = {"problems": len(counted), "completions_per_problem": n, "dropped_problems": dropped}
    without = summary["completions_without_reward"] = int((~counted).sum())
    of_set = f"{len(counted)} problems{f' of {name}' if name else ''}"
    table = Table("metric", "value", "95 % interval", title=f"{cfg.policy.path} on {of_set}")
    for metric, per_problem in values.items():
        per_problem = per_problem[~per_problem.isnan()].tolist()
        if not per_problem:
            raise ValueError(
                f"{metric} cannot be computed: the reward abstained from too many completions of every problem"
            )
        low, high = interval(per_problem)
        value = sum(per_problem) / len(per_problem)
        summary[metric] = {"value": value, "interval": [low, high]}
        table.add_row(metric, f"{value:.4f}", f"{low:.4f} to {high:.4f}")
    summary["length"] = sum(sample["length"] for sample in samples) / len(samples)
    summary["truncated"] = sum(sample["truncated"] for sample in samples) / len(samples)
    if summary["truncated"] == 1:
        log.warning(
            "100 %% of the %d completions reached the limit of %d tokens before the end of sequence: raise sampler.max_new_tokens",
            len(samples),
            cfg.sampler.max_new_tokens,
        )
    Console().print(table)
    print(f"mean length {summary['length']:.1f} tokens, {summary['truncated']:.1%} truncated")
    if without:
        print(f"the reward abstained from {without} of {len(samples)} completions, which do not count")
    return summary


def _per_problem(samples: list[dict[str, Any]], settings: Any) -> tuple[int, Any, dict[str, Any]]:
    """Return the completions per problem, which of them count [problems n], and each metric's value per problem."""
    import torch

    from rlmod.training.accuracy import best_at_k, majority_at_k, mean_at_k, pass_at_k

    n = settings.sampler.completions_per_prompt
    counted = torch.tensor([sample["correct"] is not None for sample in samples]).view(-1, n)
    correct = torch.tensor([bool(sample["correct"]) for sample in samples]).view(-1, n)
    rewards = torch.tensor([sample["reward"] or 0.0 for sample in samples], dtype=torch.float64).view(-1, n)
    answers = [sample.get("final_answer") for sample in samples]
    # A problem without a reward for any of its completions is left out: 0 / 0 is NaN.
    values = {f"mean@{n}": mean_at_k(correct, counted)}
    values |= {f"pass@{k}": pass_at_k(correct, k, counted) for k in settings.pass_at}
    values |= {f"maj@{k}": majority_at_k(correct, answers, k, counted) for k in settings.maj_at}
    values |= {f"best@{k}": best_at_k(rewards, k, counted) for k in settings.best_at}
    return n, counted, values


def main() -> None:
    cli.run(evaluate, "eval")


if __name__ == "__main__":
    main()
