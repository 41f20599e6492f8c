"""Complete checkpoints: the trainer's state, the policy in Hugging Face format, the config and the run's records, in one folder."""

import logging
import os
import shutil
import signal
import threading
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.tensor import DTensor

from rlmod import ops
from rlmod.config.cli import Stopped
from rlmod.model.saving import placeholders, save_policy
from rlmod.reward._failures import RewardError
from rlmod.strategy._sharding import Sharding
from rlmod.training import checkpoint as checkpoints
from rlmod.training.module import RLModule

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C, and the signals that schedulers send before they kill a job. submitit sends SIGUSR2."""


class Checkpoints(Checkpoint):
    """Writes ``checkpoints/step-N/`` every ``every`` iterations and whenever training ends, and keeps the newest ``keep`` intact ones.

        trainer.ckpt   weights, optimizer, schedule, position in the data, random states: a run resumes from these
        policy/        the policy, for AutoModelForCausalLM.from_pretrained
        config.yaml    the resolved config of the run
        metrics.csv, samples.jsonl   the run's records up to here
        complete.json  the size and the digest of each of these files

    A folder gets its name when it is complete, after the rollout batch's metrics have been logged. ``checkpoints/best`` links to the one
    with the highest held-out accuracy, which is kept beside the newest ones (``best``).

    The first Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 lets the iteration finish and writes a checkpoint; a second one stops the run at once.
    An iteration that fails before its first optimizer step leaves a checkpoint of the iteration before; with several ranks, if the error is
    one of a reward, which all of them are told. In a single process an iteration that is still collecting ``wait_seconds`` after a signal,
    as with a reward that hangs, is given up in the same way. Once it takes optimizer steps, it is always finished.

    ValueError if a checkpoint cannot be written. What can be known before the first iteration is tried then.
    """

    def __init__(
        self, *, folder: str, every: int = 50, keep: int = 2, best: bool = True, wait_seconds: float = 60.0
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"callbacks.checkpoints.every and .keep must be at least 1, got {every} and {keep}")
        if wait_seconds <= 0:
            raise ValueError(f"callbacks.checkpoints.wait_seconds must be above 0, got {wait_seconds}")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.best, self.wait_seconds = best, wait_seconds
        self.best_accuracy: float | None = None
        self.best_step: int | None = None
        """The highest held-out accuracy after training began, and its optimizer step."""
        self.stop_requested = False
        """True if another callback asked to stop in the middle of an iteration, which is finished first."""
        self.last_state: dict[str, Any] | None = None
        """The parts of a checkpoint that a failing iteration changes, as they were at the end of the iteration before."""
        self.tried_step: int | None = None
        """The optimizer step of the last checkpoint that was written, or failed to be."""
        self.tried = False
        self.interrupted: signal.Signals | None = None
        self.fitting = False
        self.trainer: L.Trainer | None = None
        self.first_step = 0
        self.unpublished: Path | None = None
        """The folder of a checkpoint that still lacks the run's records, its manifest and its final name."""
        self.handlers: dict[int, Any] = {}
        self.alarm: threading.Timer | None = None
        self.waited = False
        """True if the wait for the end of an iteration after a signal is over."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = trainer.current_epoch + 1
        last = done == trainer.max_epochs or trainer.global_step == trainer.max_steps
        # All ranks stop together, even if only one received the signal.
        stop = float(trainer.should_stop or self.stop_requested)
        asked = torch.tensor([float(self.interrupted or 0), stop], device=pl_module.device)
        number, stop = (int(value) for value in ops.all_max(asked).tolist())
        self.interrupted = signal.Signals(number) if number else None
        trainer.should_stop = bool(number or stop)
        improved = self._improved(pl_module, trainer.global_step)
        self.last_state = _progress(trainer)
        if number or stop or last or improved or done % self.every == 0:
            self.write(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.should_stop:  # a Timer, or trainer.max_time: the Trainer would cut the iteration in two
            self.stop_requested, trainer.should_stop = True, False

    def _improved(self, module: L.LightningModule, step: int) -> bool:
        """Return True if the validation at this step found the highest held-out accuracy so far, and remember it."""
        assert isinstance(module, RLModule)
        accuracy = module.held_out["accuracy"]
        if not self.best or module.held_out["step"] != step or accuracy is None or accuracy != accuracy:
            return False
        if self.best_accuracy is not None and accuracy <= self.best_accuracy:
            return False
        self.best_accuracy, self.best_step = accuracy, step
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best_accuracy": self.best_accuracy, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Of another run, the step would name a checkpoint that is not here.
        if state_dict.get("best_step") is not None and (self.folder / _name(state_dict["best_step"])).is_dir():
            self.best_accuracy, self.best_step = state_dict["best_accuracy"], state_dict["best_step"]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write a checkpoint of the last complete iteration, if the weights are still those, and the micro-batches that were to blame."""
        self._disarm()
        if not self.fitting:
            return
        assert isinstance(pl_module, RLModule)
        if pl_module.suspects:
            file = self.folder.parent / f"not_finite-rank-{trainer.global_rank}.pt"
            torch.save(
                [{**vars(rows), "terms": dict(rows.terms), "extra": dict(rows.extra)} for rows in pl_module.suspects],
                file,
            )
            log.warning("the micro-batches of the step that was not finite are in %s", file)
        at_once = isinstance(exception, Stopped) and not self.waited
        agreed = trainer.world_size == 1 or isinstance(exception, RewardError)
        state = self.last_state
        if at_once or not agreed or state is None or state["global_step"] != trainer.global_step:
            return
        if self.tried_step != trainer.global_step:
            pl_module.checkpoint_changes = state
            try:
                self.write(trainer, pl_module)
            finally:
                pl_module.checkpoint_changes = None
        self.publish(trainer)
        if not (self.folder / _name(trainer.global_step)).is_dir():  # writing it is what failed
            return
        log.warning("the state after step %d is in %s", trainer.global_step, self.folder / _name(trainer.global_step))
        if isinstance(exception, Stopped):
            exception.resume_with = f"resume={self.folder.parent}"

    # The Trainer logs a rollout batch's metrics after on_train_epoch_end, so metrics.csv has them only from these hooks on.

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.publish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.publish(trainer)

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write everything but the run's records into a folder with a temporary name."""
        assert isinstance(pl_module, RLModule)
        self.tried_step = trainer.global_step
        self._check_finite(trainer, pl_module)
        partial = self.folder / f".partial-{_name(trainer.global_step)}"
        try:
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            trainer.strategy.barrier()
            trainer.save_checkpoint(partial / "trainer.ckpt")
            sharding, policy = trainer.strategy, pl_module.policy
            policy, weights = sharding.full_state_dict(policy) if isinstance(sharding, Sharding) else (policy, None)
            if trainer.is_global_zero:
                save_policy(policy, pl_module.tokenizer, partial / "policy", weights)
                shutil.copy(self.folder.parent / "config.yaml", partial / "config.yaml")
        except (OSError, RuntimeError) as error:  # torch raises a RuntimeError if a disk is full
            raise self._write_error(partial, error) from error
        self.unpublished = partial

    def _check_finite(self, trainer: L.Trainer, module: RLModule) -> None:
        """ValueError, on all ranks, if a weight of the policy is not finite: a checkpoint of it would be worthless."""
        bad = [name for name, weight in module.policy.named_parameters() if not _is_finite(weight)]
        if bool(ops.all_max(torch.tensor(float(len(bad)), device=module.device))):
            kept = checkpoints.list_checkpoints(self.folder.parent)
            raise ValueError(
                f"step {trainer.global_step}: the policy has weights that are not finite ({bad[0] if bad else 'on another rank'}), so no "
                f"checkpoint of it is written; {f'the newest one is {kept[-1]}' if kept else 'there is no earlier one'}. Lower the "
                "learning rate"
            )

    def publish(self, trainer: L.Trainer) -> None:
        """Add the run's records and the manifest, give the folder its final name, and delete the oldest checkpoints beyond ``keep``."""
        if self.unpublished is None:
            return
        partial, self.unpublished = self.unpublished, None
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            try:
                for name in checkpoints.RECORDS:
                    if (self.folder.parent / name).is_file():
                        shutil.copy(self.folder.parent / name, partial / name)
                checkpoints.write_manifest(partial)
            except OSError as error:
                raise self._write_error(partial, error) from error
            target = self.folder / partial.name.removeprefix(".partial-")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            best = None if self.best_step is None else self.folder / _name(self.best_step)
            if best is not None and best.is_dir():
                _link(self.folder / checkpoints.BEST, best.name)
            checkpoints.fsync(self.folder)
            found = checkpoints.list_checkpoints(self.folder.parent)
            intact = [each for each in found if checkpoints.find_damage(each, contents=False) is None]
            for old in intact[: -self.keep]:
                if old != best:
                    shutil.rmtree(old)
        trainer.strategy.barrier()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and not self.tried:
            assert isinstance(pl_module, RLModule)
            self.tried = True
            self._try_to_write(pl_module)

    def _try_to_write(self, module: RLModule) -> None:
        """Write a checkpoint's files without its weights, and compare the free space with the size of the weights."""
        trial = self.folder / ".trial"
        try:
            trial.mkdir(parents=True, exist_ok=True)
            save_policy(module.policy, module.tokenizer, trial, placeholders(module.policy))
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"checkpoints could not be written in {self.folder}: {reason}") from error
        finally:
            shutil.rmtree(trial, ignore_errors=True)
            with suppress(OSError):  # it may hold checkpoints
                self.folder.rmdir()
        # policy/ and trainer.ckpt have the weights; trainer.ckpt also has two moments per trained weight.
        needed = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 2) for p in module.policy.parameters())
        free = shutil.disk_usage(self.folder.parent).free
        if free < needed:
            raise ValueError(
                f"checkpoints could not be written in {self.folder}: one needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
                "free; make room, or give another output=FOLDER"
            )

    def _write_error(self, partial: Path, error: Exception) -> ValueError:
        shutil.rmtree(partial, ignore_errors=True)
        kept = checkpoints.list_checkpoints(self.folder.parent)
        reason = str(error).splitlines()[0]
        newest = f"the newest complete one is {kept[-1]}" if kept else "there is no earlier one"
        return ValueError(
            f"the checkpoint {partial.name.removeprefix('.partial-')} could not be written ({reason}); {newest}"
        )

    # The Trainer installs its signal handlers just before these hooks. They would end the run in the middle of an iteration.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.fitting, self.trainer, self.first_step = True, trainer, trainer.global_step
        self._install_handlers()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install_handlers()

    def _install_handlers(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) != self._handle_signal:
                self.handlers[number] = signal.signal(number, self._handle_signal)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted or not self.fitting:
            run = self.folder.parent
            raise Stopped(number, f"resume={run}" if checkpoints.list_checkpoints(run) else None)
        self.interrupted = signal.Signals(number)
        log.warning(
            "%s: finishing this iteration, then writing a checkpoint; send it again to stop at once",
            self.interrupted.name,
        )
        if self.trainer is not None and self.trainer.world_size == 1:  # several ranks must stop at the same place
            self.alarm = threading.Timer(self.wait_seconds, self._end_wait, (self.trainer,))
            self.alarm.daemon = True
            self.alarm.start()

    def _end_wait(self, trainer: L.Trainer) -> None:
        """Send the signal to the main thread again if the iteration is still collecting. Its weights are those of the iteration before."""
        assert self.interrupted is not None
        if trainer.global_step != (self.first_step if self.last_state is None else self.last_state["global_step"]):
            return
        self.waited = True
        log.warning("the iteration has not finished after %.0f s and is given up", self.wait_seconds)
        signal.pthread_kill(threading.main_thread().ident or 0, self.interrupted)

    def _disarm(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.fitting = False
        self._disarm()
        while self.handlers:
            number, handler = self.handlers.popitem()
            # Otherwise the Trainer has already restored the earlier handler.
            if signal.getsignal(number) == self._handle_signal:
                signal.signal(number, handler)


def _is_finite(weight: torch.nn.Parameter) -> bool:
    local = weight.to_local() if isinstance(weight, DTensor) else weight  # every rank looks at its shard
    return bool(local.detach().isfinite().all())


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _link(link: Path, target: str) -> None:
    """Point a symbolic link to ``target``, atomically."""
    if link.is_dir() and not link.is_symlink():  # the run was copied without its links
        checkpoints.set_aside(link)
    partial = link.with_name(f".partial-{link.name}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    os.replace(partial, link)


def _progress(trainer: L.Trainer) -> dict[str, Any]:
    """Return the parts of a checkpoint that the next iteration changes before its first optimizer step. Every rank calls this."""
    data, module = getattr(trainer, "datamodule", None), trainer.lightning_module
    assert isinstance(module, RLModule)
    connector: Any = vars(trainer)["_checkpoint_connector"]
    state: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "loops": deepcopy(connector._get_loops_state_dict()),
        "tokens_sampled": module.tokens_sampled,
        "iteration_complete": True,
    }
    return state if data is None else {**state, type(data).__qualname__: data.state_dict()}
