"""Entry point shared by the commands: compose the config with Hydra, run the task, and report a user's mistake in one paragraph."""

import copy
import csv
import difflib
import functools
import io
import logging
import math
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from rlmod import distributed
from rlmod.config.environment import redact
from rlmod.jsonl import SURROGATE

log = logging.getLogger(__name__)

# For sizes that follow from others, as in ${multiply:20,${batch.minibatches}}.
OmegaConf.register_new_resolver("multiply", lambda *factors: math.prod(factors), replace=True)


def _term_weights(*, _root_: DictConfig) -> dict[str, float]:
    """Return the weights of a weighted reward's terms by name; empty for a reward without terms."""
    terms = OmegaConf.select(_root_, "reward.terms") or {}
    return {str(name): term.weight for name, term in terms.items() if term is not None}


# For components that read the terms of the reward, as in ${term_weights:}.
OmegaConf.register_new_resolver("term_weights", _term_weights, replace=True)

USER_MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException)
"""Exceptions that are answered with a message; others, which are errors in the code, with a traceback."""


class Stopped(BaseException):
    """A signal ended the run. This is not a KeyboardInterrupt, because Lightning's Trainer handles those itself and exits.

    ``resume_with`` is the override that resumes the run; None if there is no checkpoint.
    """

    def __init__(self, number: int, resume_with: str | None = None) -> None:
        super().__init__(number, resume_with)
        self.number, self.resume_with = number, resume_with

    def report(self) -> int:
        """Print that the run was stopped and how to resume it. Return the exit status."""
        print(f"stopped; resume with {self.resume_with}" if self.resume_with else "stopped", file=sys.stderr)
        return 128 + self.number


def config_folder() -> Path:
    """Return ``conf/`` of the checkout, or its copy in an installed package."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose(config_name: str, overrides: Sequence[str] | DictConfig) -> DictConfig:
    """Compose a config in Python as the command does; of a composed config, return a copy.

    ValueError for overrides that the command refuses.
    """
    if isinstance(overrides, DictConfig):
        return copy.deepcopy(overrides)
    if isinstance(overrides, str) or not all(isinstance(each, str) for each in overrides):
        raise ValueError(
            f'overrides must be a list of texts, as in ["experiment=quickstart", "seed=1"], got {overrides!r}'
        )
    with mistakes_as_value_errors(), hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = hydra.compose(config_name, overrides=list(overrides))
        _check_benchmarks(cfg, overrides, [config_folder()])
        return cfg


def _check_benchmarks(cfg: DictConfig, overrides: Sequence[str], folders: Sequence[Path]) -> None:
    """Raise ValueError for ``benchmark=[...]`` with options that Hydra would read as fewer sets than were named."""
    if any("benchmark=" in text for text in overrides):
        from rlmod.config.benchmarks import check_options  # imports torch

        check_options(overrides, OmegaConf.select(cfg, "benchmark"), folders)


@contextmanager
def mistakes_as_value_errors() -> Iterator[None]:
    """Raise ValueError with the command's message in place of an error of Hydra or OmegaConf."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        message = explain_error(error)
        if type(error) is ValueError and str(error) == message:
            raise
        raise ValueError(message) from error


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Let ``${hydra:runtime.output_dir}`` be this folder, and restore Hydra's settings of a program that calls rlmod."""
    holder = HydraConfig.instance()
    before = holder.cfg
    settings = OmegaConf.create({"hydra": OmegaConf.structured(HydraConf)})
    settings.hydra.runtime.output_dir = str(folder)
    holder.set_config(settings)
    try:
        yield
    finally:
        holder.cfg = before


def run(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Run ``task`` with the config composed from the command line.

    A user's mistake (ValueError, OSError, or an error of Hydra) exits with status 1 and a message without a traceback; HYDRA_FULL_ERROR=1
    shows the traceback. Other exceptions, which are errors in the code, keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a locale that lacks a completion's characters must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for argument in sys.argv[1:]:
        if not argument.isascii() and SURROGATE.search(argument):
            sys.exit(
                f"{Path(sys.argv[0]).name}: {argument!r} is not text in this locale; set a UTF-8 one, as LC_ALL=C.UTF-8"
            )
    sys.path.insert(0, os.getcwd())  # a user's own components are in the current folder
    sys.argv += distributed.rank_output_overrides()
    # huggingface_hub has its own handler, so every message would appear twice.
    logging.getLogger("huggingface_hub").propagate = False
    with_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints the error and exits before this function can

    @functools.wraps(task)
    def with_original_setting(cfg: DictConfig) -> object:
        os.environ["HYDRA_FULL_ERROR"] = str(int(with_traceback))  # inherited by the ranks that this process starts
        try:
            hydra_cfg = HydraConfig.get()
            folders = [Path(source.path) for source in hydra_cfg.runtime.config_sources if source.schema == "file"]
            _check_benchmarks(cfg, list(hydra_cfg.overrides.task), folders)
            return task(cfg)
        finally:
            os.environ["HYDRA_FULL_ERROR"] = "1"

    command = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(
        with_original_setting
    )
    try:
        with distributed.rank_zero_reports_first():
            command()
    except USER_MISTAKES as error:
        if with_traceback:
            raise
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        sys.exit(f"{Path(sys.argv[0]).name}: {explain_error(error)}{redact(notes)}")
    except Stopped as stop:
        sys.exit(stop.report())
    except KeyboardInterrupt:
        sys.exit(Stopped(signal.SIGINT).report())


def explain_error(error: BaseException) -> str:
    """Return one paragraph that names the key, its value, and what would be right; of an environment variable only the name."""
    return redact(_explain(error))


def _explain(error: BaseException) -> str:
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            return _unknown_key(cause)
        if isinstance(cause, MissingMandatoryValue | InterpolationToMissingValueError):
            key = str(cause).split("Missing mandatory value: ")[-1].split()[0]
            return f"{key} is missing: set {key}=..."
        if isinstance(cause, InstantiationException):
            return _instantiation(cause)
        if isinstance(cause, OverrideParseException):
            key, _, value = str(cause.override).partition("=")
            return f"{key}={value} is not a valid override; put a value with special characters in quotes: '{key}=\"{value}\"'"
        if isinstance(cause, MissingConfigException) and "submitit" in str(cause.missing_cfg_file):
            return "hydra/launcher=slurm needs the package hydra-submitit-launcher: pip install 'rlmod[slurm]'"
        if isinstance(cause, MissingConfigException):
            return str(cause).partition("\nConfig search path")[0].replace("\n", " ").replace("\t", " ")
        if "Config group override must be a string or a list" in str(cause):
            return "a group got null: give one of its options, as in guide=none; `rlmod-train --help` lists the groups with their options"
        if isinstance(cause, ValueError) and not isinstance(cause, OmegaConfBaseException):
            return str(cause)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}; give a writable folder, as output=FOLDER"
    return str(error)


def _instantiation(error: InstantiationException) -> str:
    """Reorder Hydra's message: the key first, the reason last."""
    message, _, key = str(error).partition("\nfull_key: ")
    reasons = []
    cause = error.__cause__
    while cause is not None:
        reasons.append(f"{type(cause).__name__}: {cause}" if not isinstance(cause, ValueError) else str(cause))
        cause = cause.__cause__
    if message.startswith("Error locating target"):
        target = message.split("'")[1]
        return (
            f"{key.strip()}._target_: cannot import {target!r}{': ' if reasons else ''}{reasons[-1] if reasons else ''} "
            "(it is looked for in the current folder and in the installed packages)"
        )
    reason, key = reasons[0] if reasons else message, key.strip()
    return reason if reason.startswith(key) else f"{key}: {reason}"


def _unknown_key(error: ConfigKeyError | ConfigAttributeError) -> str:
    parent = error.parent_node
    known = sorted(str(key) for key in parent) if OmegaConf.is_dict(parent) else []
    where = str(error.full_key).rpartition(".")[0]
    if not where:  # groups without a chosen option are not keys of the config yet
        known = sorted({*known, *(group.name for group in config_folder().iterdir() if group.is_dir())} - {"hydra"})
    close = difflib.get_close_matches(str(error.key), known, n=1)
    return (
        f"unknown key {error.full_key}"
        + (f"; did you mean {where}{'.' if where else ''}{close[0]}?" if close else "")
        + f"; {where or 'the config'} has: {', '.join(known)}. To add the key anyway: +{error.full_key}=..."
    )


def silence_libraries() -> None:
    """Silence the libraries' messages about devices, loading and rlmod's own choices. Their other warnings stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # trainer.profiler logs its table
    if logging.getLogger().hasHandlers():  # otherwise Lightning's own handler would print every message a second time
        logging.getLogger("lightning").handlers.clear()
    for harmless in (
        "Experiment logs directory",  # the run's folder already holds the config; nothing is deleted
        "`isinstance(treespec, LeafSpec)` is deprecated",
        "Multiple backends are registered with this ProcessGroup",  # FSDP on a CPU
        "Please use DTensor instead",  # FSDP's sharded checkpoints
        "It is recommended to use `self.log",  # logged values are already reduced over all ranks
    ):
        warnings.filterwarnings("ignore", message=f".*{re.escape(harmless)}")


class Results(Callback):
    """Writes results.csv of a multirun: one line per run as soon as it ends, with its return value or the error."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        row = {"run": config.hydra.job.num, "overrides": redact(config.hydra.job.override_dirname)}
        try:
            outcome = {"objective": job_return.return_value, "error": ""}
        except Exception as error:
            outcome = {"objective": "", "error": explain_error(error)}
            log.error("run %s failed: %s", config.hydra.job.num, outcome["error"])
            if not isinstance(error, USER_MISTAKES):
                log.error("%s", redact("".join(traceback.format_exception(error))))
        file = Path(config.hydra.sweep.dir) / "results.csv"
        row |= outcome
        new = not file.exists()
        with file.open("a", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
