"""The boundary of the commands: Hydra composes the config, and what a user did wrong is said in one paragraph."""

import csv
import difflib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

log = logging.getLogger(__name__)


def config_folder() -> Path:
    """``conf/`` of the checkout, or the copy that an installed rlmod carries."""
    package = Path(__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def run(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Runs ``task`` with the composed config.

    A user's mistake (ValueError, and what Hydra finds) ends with exit status 1 and a message without a traceback; HYDRA_FULL_ERROR=1
    shows the traceback. Errors of our own keep theirs.
    """
    sys.path.insert(0, os.getcwd())  # a user's own components lie where the command is run
    with_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print and exit before this function could say it better
    command = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(task)
    try:
        command()
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if with_traceback:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {explained(error)}")
    except KeyboardInterrupt as interrupt:
        print(f"stopped; go on with {interrupt}" if interrupt.args else "stopped", file=sys.stderr)
        sys.exit(130)


def explained(error: BaseException) -> str:
    """What is wrong, by its key, and what would be right."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigKeyError):
            return _unknown_key(cause)
        if isinstance(cause, InstantiationException) and isinstance(cause.__cause__, TypeError):
            return f"{cause}".replace("\n", " ")
        if type(cause) is ValueError or (isinstance(cause, ValueError) and not isinstance(cause, HydraException)):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}; give a folder that can be written, as output=FOLDER"
    return str(error)


def _unknown_key(error: ConfigKeyError) -> str:
    parent = error.parent_node
    known = sorted(str(key) for key in parent) if OmegaConf.is_dict(parent) else []
    where = str(error.full_key).rpartition(".")[0]
    close = difflib.get_close_matches(str(error.key), known, n=1)
    return (
        f"unknown key {error.full_key}"
        + (f"; did you mean {where}{'.' if where else ''}{close[0]}?" if close else "")
        + f" {where or 'the config'} has: {', '.join(known)}. To add a key all the same: +{error.full_key}=..."
    )


class Results(Callback):
    """Of a multirun: results.csv in its folder has a line a run as soon as it ends, with what it returned or why it failed."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        try:
            outcome = {"objective": job_return.return_value, "error": ""}
        except Exception as error:  # noqa: BLE001 (whatever a run died of, the others go on, and the file says it)
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
