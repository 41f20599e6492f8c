"""The boundary of the commands: Hydra composes the config, and what a user did wrong is said in one paragraph."""

import csv
import difflib
import functools
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from rlmod import distributed

log = logging.getLogger(__name__)


class Stopped(BaseException):
    """A signal has ended the run. No KeyboardInterrupt: of those the Trainer makes an exit of its own."""

    def __init__(self, number: int, go_on: str | None = None) -> None:
        super().__init__(number, go_on)
        self.number, self.go_on = number, go_on

    def told(self) -> int:
        """Says so, and returns the exit status."""
        print(f"stopped; resume with {self.go_on}" if self.go_on else "stopped", file=sys.stderr)
        return 128 + self.number


def config_folder() -> Path:
    """``conf/`` of the checkout, or the copy that an installed rlmod carries."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a config as the command would, from Python; ValueError for what the command would refuse."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            cfg = hydra.compose(config_name, overrides=list(overrides), return_hydra_config=True)
            with open_dict(cfg):  # the run's folder, which ${hydra:runtime.output_dir} names
                cfg.output = cfg.output and str(cfg.output)
                if cfg.output is not None:
                    cfg.hydra.runtime.output_dir = cfg.output
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            return cfg
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explained(error)) from error


def run(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Runs ``task`` with the composed config.

    A user's mistake (ValueError, and what Hydra finds) ends with exit status 1 and a message without a traceback; HYDRA_FULL_ERROR=1
    shows the traceback. Errors of our own keep theirs.
    """
    sys.path.insert(0, os.getcwd())  # a user's own components lie where the command is run
    sys.argv += distributed.rank_output_overrides()
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own, and would say all twice
    with_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print and exit before this function could say it better

    @functools.wraps(task)
    def with_own_setting(cfg: DictConfig) -> object:
        os.environ["HYDRA_FULL_ERROR"] = str(int(with_traceback))  # the ranks that this one starts take it over
        try:
            return task(cfg)
        finally:
            os.environ["HYDRA_FULL_ERROR"] = "1"

    command = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(
        with_own_setting
    )
    try:
        with distributed.rank_zero_reports_first():
            command()
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if with_traceback:
            raise
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        sys.exit(f"{Path(sys.argv[0]).name}: {explained(error)}{notes}")
    except Stopped as stop:
        sys.exit(stop.told())
    except KeyboardInterrupt:
        sys.exit(Stopped(signal.SIGINT).told())


def explained(error: BaseException) -> str:
    """Say which key is wrong, and what would be right."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            return _unknown_key(cause)
        if isinstance(cause, MissingMandatoryValue | InterpolationToMissingValueError):
            key = str(cause).split("Missing mandatory value: ")[-1].split()[0]
            return f"{key} is missing: give it, as {key}=..."
        if isinstance(cause, InstantiationException):
            return _instantiation(cause)
        if isinstance(cause, OverrideParseException):
            key, _, value = str(cause.override).partition("=")
            return f"{key}={value} cannot be read as an override; a value with such characters goes in quotes: '{key}=\"{value}\"'"
        if isinstance(cause, MissingConfigException) and "submitit" in str(cause.missing_cfg_file):
            return "hydra/launcher=slurm needs the package hydra-submitit-launcher: pip install 'rlmod[slurm]'"
        if isinstance(cause, MissingConfigException):
            return str(cause).partition("\nConfig search path")[0].replace("\n", " ").replace("\t", " ")
        if isinstance(cause, ValueError) and not isinstance(cause, OmegaConfBaseException):
            return str(cause)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}; give a folder that can be written, as output=FOLDER"
    return str(error)


def _instantiation(error: InstantiationException) -> str:
    """Hydra's words, with the key first and the reason last."""
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
    if not where:  # the groups that nothing is chosen from are no keys yet
        known = sorted({*known, *(group.name for group in config_folder().iterdir() if group.is_dir())} - {"hydra"})
    close = difflib.get_close_matches(str(error.key), known, n=1)
    return (
        f"unknown key {error.full_key}"
        + (f"; did you mean {where}{'.' if where else ''}{close[0]}?" if close else "")
        + f"; {where or 'the config'} has: {', '.join(known)}. To add a key all the same: +{error.full_key}=..."
    )


def quiet() -> None:
    """Leaves out what the libraries say of devices, loading, and our own choices; their warnings about anything else stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for harmless in (
        "Experiment logs directory",  # the run's folder holds the config already; nothing of it is deleted
        "`isinstance(treespec, LeafSpec)` is deprecated",
        "Multiple backends are registered with this ProcessGroup",  # of FSDP on a CPU
        "Please use DTensor instead",  # of FSDP's sharded checkpoints
        "It is recommended to use `self.log",  # what is logged is of all ranks already
    ):
        warnings.filterwarnings("ignore", message=f".*{re.escape(harmless)}")


class Results(Callback):
    """Write results.csv of a multirun: one line per run as soon as it ends, with its return value or why it failed."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        try:
            outcome = {"objective": job_return.return_value, "error": ""}
        except Exception as error:
            outcome = {"objective": "", "error": explained(error)}
            log.error("run %s failed: %s", config.hydra.job.num, outcome["error"], exc_info=error)
        file = Path(config.hydra.sweep.dir) / "results.csv"
        row = {"run": config.hydra.job.num, "overrides": config.hydra.job.override_dirname, **outcome}
        new = not file.exists()
        with file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
