"""``rlmod-train experiment=gtpo policy.path=Qwen/Qwen2.5-0.5B data=problem_file data.path=problems.jsonl``"""

import json
import logging
import platform
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod.config import cli

if TYPE_CHECKING:
    import lightning as L

    from rlmod.config.build import Components
    from rlmod.training.datamodule import RLData
    from rlmod.training.module import RLModule

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float | None:
    """Run the command: train in the folder that Hydra made, and return the held-out accuracy, for a sweeper."""
    result = run(cfg, _folder(cfg))
    return result["held_out"] and result["held_out"]["after"]


def train_from_python(overrides: Sequence[str] | DictConfig = ()) -> dict[str, Any]:
    """Train as ``rlmod-train OVERRIDES`` does; return the run's result (result.json), with its ``folder``.

    ``overrides`` are words of the command line, such as ``["experiment=quickstart", "seed=1"]``, or a composed config. ValueError for
    what the command would refuse.
    """
    cfg = overrides if isinstance(overrides, DictConfig) else cli.compose("train", overrides)
    folder = Path(cfg.output)
    cfg.output = str(folder)  # names by the time are fixed here
    folder.mkdir(parents=True, exist_ok=True)
    return {**run(cfg, folder), "folder": str(folder)}


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Run once: checks, data, policy, validation, training, report. Return the result, which result.json holds too."""
    started = time.perf_counter()
    # From cheap to dear: a mistake shows before anything heavy is imported or loaded.
    from rlmod import distributed
    from rlmod.config import compatibility
    from rlmod.config.build import Components
    from rlmod.config.sizes import check_seed
    from rlmod.interfaces import prepare
    from rlmod.training import checkpoint as checkpoints

    logging.captureWarnings(True)
    check_seed(cfg.seed, "seed")
    parts = Components.from_config(cfg)
    compatibility.check(parts, _ranks(cfg.trainer), OmegaConf.select(cfg, "trainer.strategy._target_"))
    for key in ("max_epochs", "check_val_every_n_epoch"):
        if not isinstance(cfg.trainer[key], int) or cfg.trainer[key] < 1:
            raise ValueError(
                f"trainer.{key} must be a whole number of iterations, at least 1, got {cfg.trainer[key]!r}"
            )
    if (finished := _finished(folder, cfg)) is not None:
        return finished
    if (checkpoint := checkpoints.find_resume_checkpoint(folder, cfg)) is not None:
        checkpoints.check_optimizer(checkpoint, cfg)
    if distributed.is_rank_zero():
        checkpoints.rewind(folder, checkpoint)
        if checkpoint is None:
            print(f"a new run in {folder}", flush=True)
        else:
            log.warning("resuming from %s", checkpoint)
            if changed := checkpoints.changed_settings(checkpoint, cfg):
                log.warning("with other settings than it was made with: %s", "; ".join(changed))
        checkpoints.write_config(folder, cfg)
    read, read_held_out = parts.train(), parts.held_out() if parts.held_out else None
    tokenizer = parts.policy.tokenizer()  # after the problems: a file that is not there shows before a hub is asked
    problems = parts.encoder.encode(read, tokenizer)
    held_out = parts.encoder.encode(read_held_out, tokenizer) if read_held_out is not None else None
    prepare([parts.sampler, parts.guide, parts.reward, parts.reference], problems.problems, tokenizer)
    validated = held_out.problems if held_out else ()
    prepare([parts.validation.sampler, parts.validation.reward], validated, tokenizer)
    problems.check_max_model_len(parts.sampler, "sampler")
    if held_out:
        held_out.check_max_model_len(parts.validation.sampler, "validation.sampler")

    import lightning as L

    cli.quiet()
    L.seed_everything(cfg.seed, verbose=False)
    trainer = _trainer(cfg, checkpoints.own_step(folder, checkpoint))
    module = _module(cfg, parts, tokenizer)
    module.own_checkpoint = checkpoint is not None and checkpoints.is_from_same_run(folder, checkpoint, cfg)
    data = _data(cfg, parts, problems, held_out)
    with distributed.terminate_together(lambda: getattr(trainer.strategy.launcher, "procs", ())):
        return _fitted(trainer, module, data, checkpoint, folder, started)


def _ranks(trainer: DictConfig) -> int:
    """Return the number of ranks as far as the config tells: 1 per node if Lightning is to count the devices."""
    devices, nodes = trainer.devices, trainer.num_nodes
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise ValueError(f"trainer.num_nodes must be a whole number, at least 1, got {nodes!r}")
    counted = int(devices) if str(devices).isdigit() else len(devices) if OmegaConf.is_list(devices) else 1
    return max(counted, 1) * nodes


def _folder(cfg: DictConfig) -> Path:
    """The run's, which all ranks must know: where each is started by itself, none can go by the time of its start."""
    from rlmod import distributed

    given = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(given, dict)
    alone = HydraConfig.get().mode == RunMode.RUN  # a launcher of sweeps hands the same folder to all ranks
    if (
        alone
        and "${now:" in str(given["output"])
        and (distributed.is_multi_process_launch() or cfg.trainer.num_nodes > 1)
    ):
        raise ValueError(
            "output names the folder by the time, and each of several ranks that are started by themselves (torchrun, srun, nodes) "
            "would have its own: give output=FOLDER, a folder that all of them share"
        )
    return Path(HydraConfig.get().runtime.output_dir)


def _finished(folder: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """The result of this very run, where it has come to its end in this folder: then nothing is left to do."""
    from rlmod import distributed
    from rlmod.training import checkpoint as checkpoints

    if checkpoints.resumes_own_run(folder, cfg) or not checkpoints.holds_same_run(folder, cfg):
        return None
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):  # it has none; or another rank, which is ahead, is at work on it
        return None
    if not result["completed"]:
        return None
    if distributed.is_rank_zero():
        if not (page := folder / "report.html").is_file():  # it was killed when nothing else was left to do
            from rlmod.commands.report import write_report

            write_report(folder)
        print(f"this run has come to its end already; to run it again, give another output=FOLDER than {folder}")
        _say(result, page)
    return result


def _trainer(cfg: DictConfig, begun_at: int | None) -> "L.Trainer":
    from lightning.pytorch.loggers import TensorBoardLogger

    from rlmod.config.validation import check_types

    def each(group: str) -> list[Any]:
        for name, node in (cfg[group] or {}).items():
            check_types(node, f"{group}.{name}")
        return [instantiate(node) for node in (cfg[group] or {}).values()]

    check_types(cfg.trainer, "trainer")
    if (cfg.trainer.gradient_clip_val or 0) < 0:
        raise ValueError(f"trainer.gradient_clip_val must be null or at least 0, got {cfg.trainer.gradient_clip_val}")
    loggers, callbacks = each("logger"), each("callbacks")
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger) and begun_at is not None:
            # What was drawn beyond the run's own checkpoint is drawn again.
            vars(logger)["_kwargs"]["purge_step"] = begun_at
    try:
        return instantiate(cfg.trainer, logger=loggers, callbacks=callbacks)
    except InstantiationException as error:
        raise ValueError(f"trainer: {type(error.__cause__).__name__}: {error.__cause__}") from error


def _module(cfg: DictConfig, parts: "Components", tokenizer: Any) -> "RLModule":
    from rlmod.training.module import RLModule

    return RLModule(
        policy=parts.policy.model(tokenizer),
        tokenizer=tokenizer,
        sampler=parts.sampler,
        guide=parts.guide,
        reward=parts.reward,
        filter=parts.filter,
        zero_reward=parts.zero_reward,
        threshold=parts.threshold,
        reference=parts.reference,
        shaper=parts.shaper,
        correction=parts.correction,
        loss=parts.loss,
        regularizer=parts.regularizer,
        optimizer=parts.optimizer,
        schedule=instantiate(cfg.schedule),
        validation=parts.validation,
        batch=parts.batch,
        max_skipped_steps=cfg.guard.max_skipped,
        seed=cfg.seed,
    )


def _data(cfg: DictConfig, parts: "Components", problems: Any, held_out: Any) -> "RLData":
    from rlmod.training.datamodule import RLData

    return RLData(train=problems, held_out=held_out, aggregation=parts.aggregation)


def _fitted(
    trainer: "L.Trainer", module: Any, data: Any, checkpoint: Path | None, folder: Path, started: float
) -> dict[str, Any]:
    from rlmod.commands.report import write_report
    from rlmod.model.policy import saved_weights, trained_weights
    from rlmod.strategy._sharding import Sharding, check_readable
    from rlmod.training.callbacks.checkpoints import Checkpoints
    from rlmod.training.checkpoint import check_same_policy

    if checkpoint is not None:
        check_readable(trainer.strategy, checkpoint)
        if isinstance(trainer.strategy, Sharding):  # PyTorch would stumble over other shapes in the middle of loading
            saved = saved_weights(checkpoint / "policy")
            check_same_policy(saved, trained_weights(module.policy, saved))
    if checkpoint is None:
        module.history["before"] = _held_out(trainer, module, data)
    module.fit_started = time.perf_counter()
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint / "trainer.ckpt" if checkpoint else None)
    training = module.training_seconds()
    interrupted = next((c.interrupted for c in vars(trainer)["callbacks"] if isinstance(c, Checkpoints)), None)
    after = None if interrupted else _held_out(trainer, module, data)
    result = {
        "held_out": None
        if data.held_out is None
        else {
            "metric": module.validation.objective,
            "problems": module.held_out["problems"],
            "before": module.history["before"],
            "after": after,
        },
        "seconds": {"training": training, "total": time.perf_counter() - started},
        "steps": trainer.global_step,
        "tokens": module.tokens_sampled,
        "seed": module.seed,
        "versions": {name: version(name) for name in ("rlmod", "torch", "lightning", "transformers")}
        | {"python": platform.python_version()},
        "completed": interrupted is None,
    }
    if trainer.is_global_zero:
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        page = write_report(folder)
        _say(result, page)
    if (
        interrupted and trainer.is_global_zero
    ):  # another rank that ended otherwise than well would end the first before its time
        if signal.getsignal(interrupted) not in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler):
            signal.raise_signal(interrupted)  # a launcher's turn: submitit's queues the job again
        raise cli.Stopped(interrupted, f"resume={folder}, or with the same command if it names output={folder}")
    return result


def _held_out(trainer: "L.Trainer", module: Any, data: Any) -> float | None:
    """Held-out accuracy of the policy as it is now; not measured again where the last validation was of these weights."""
    if data.held_out is None:
        return None
    if module.held_out["step"] != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    return module.held_out["accuracy"]


def _say(result: dict[str, Any], page: Path) -> None:
    held_out = result["held_out"]
    if held_out and held_out["after"] is not None:
        start = "" if held_out["before"] is None else f"{held_out['before']:.4f} -> "
        print(
            f"held-out {held_out['metric'].removeprefix('val/')}: {start}{held_out['after']:.4f} on {held_out['problems']} problems; "
            f"{result['steps']} steps, {result['seconds']['training']:.0f} s of training"
        )
    print(f"report: {page}")


def main() -> None:
    cli.run(train, "train")


class _Callable(ModuleType):
    """``rlmod.train`` is this module and, as a function, its ``train_from_python``: both are called ``train``."""

    def __call__(self, overrides: Sequence[str] | DictConfig = ()) -> dict[str, Any]:
        return train_from_python(overrides)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()
