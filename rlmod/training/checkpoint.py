"""Checkpoints and resuming: find the newest intact checkpoint of a run, and restore the run's files to their state at that step."""

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from rlmod import distributed
from rlmod.config.environment import read_config, resolve_without_environment, select

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MANIFEST = "complete.json"
"""Manifest of a checkpoint: the size and the SHA-256 digest of each of its files."""
BEST = "best"
"""Link to the checkpoint with the highest held-out accuracy, in the folder ``checkpoints``."""
RECORDS = ("metrics.csv", "samples.jsonl")
"""Files that a run writes line by line. A checkpoint has a copy, so that a resumed run neither repeats nor loses a line."""


def write_manifest(folder: Path) -> None:
    """Write the manifest, the last file of a checkpoint, and flush all files to the disk."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    files = {str(path.relative_to(folder)): path for path in found}
    entries = {name: {"bytes": path.stat().st_size, "sha256": digest(path)} for name, path in files.items()}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for path in (*folder.rglob("*"), folder):  # otherwise a power cut could keep a file's name and lose its content
        fsync(path)


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_damage(folder: Path, *, contents: bool = True) -> str | None:
    """Compare a checkpoint's files with its manifest. Return what is wrong, or None if nothing is.

    ``contents=False`` compares names and sizes only, which reads no file.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    if not isinstance(entries, dict) or not entries or not all(map(_is_entry, entries.values())):
        return f"its {MANIFEST} does not hold the sizes and digests of files"
    foreign = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {*entries, MANIFEST}
    if foreign:
        return f"{min(foreign)} does not belong to it"
    for name, entry in entries.items():
        path, size = folder / name, entry["bytes"]
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found:,} of {size:,} bytes"
    for name, entry in entries.items() if contents else ():
        if digest(folder / name) != entry["sha256"]:
            return f"{name} was altered: its contents are not those that were written"
    return None


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


def _find_unreadable_state(folder: Path) -> str | None:
    """Return why the trainer's state cannot be read, or None. Weights are not read, and a sharded state is left to the strategy."""
    state = folder / "trainer.ckpt"
    if state.is_file():
        try:
            with zipfile.ZipFile(state) as archive:  # torch.save writes a zip archive
                for entry in archive.infolist():
                    with archive.open(entry) as stream:
                        stream.read(-1 if entry.filename.endswith("data.pkl") else 0)
        except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
            return f"trainer.ckpt cannot be read ({error})"
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints/step-N folders of a run, oldest first, intact or not."""
    found = [folder for folder in (run / "checkpoints").glob("step-*") if folder.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def newest_checkpoint(place: Path) -> Path:
    """Return the newest intact checkpoint in ``place``: a run's folder, or a checkpoint. ValueError if there is none."""
    found = find_newest_checkpoint(place)
    if found is None:
        raise ValueError(
            f"resume={place}: no intact checkpoint there; give a run's folder (with checkpoints/step-* in it), or one of those"
        )
    return found


def find_newest_checkpoint(place: Path) -> Path | None:
    """Return the newest intact checkpoint in ``place``, or None. Log a warning for each damaged one that is skipped."""
    single = (place / MANIFEST).is_file() or (place / "trainer.ckpt").exists()
    for folder in reversed([place] if single else list_checkpoints(place)):
        damage = find_damage(folder) or _find_unreadable_state(folder)
        if damage is None:
            return folder
        if distributed.is_rank_zero():
            log.warning("the checkpoint %s is damaged and is skipped: %s", folder, damage)
    return None


def find_resume_checkpoint(folder: Path, cfg: DictConfig) -> Path | None:
    """Return the checkpoint from which a run in ``folder`` resumes, or None if it starts from the beginning.

    The order: a checkpoint of this run that ``resume`` names, the newest of this run, a checkpoint elsewhere that ``resume`` names. So
    the same command resumes a run that was killed.
    """
    if not resumes_own_run(folder, cfg):
        return find_own_checkpoint(folder, cfg) or (newest_checkpoint(Path(cfg.resume)) if cfg.resume else None)
    chosen = newest_checkpoint(Path(cfg.resume))
    if own_step(folder, chosen) is None:
        raise ValueError(
            f"resume={cfg.resume} is in the run's own folder, but is not one of its checkpoints/step-N: give one of those, or another "
            "output=FOLDER"
        )
    return chosen


def resumes_own_run(folder: Path, cfg: DictConfig) -> bool:
    """Return True if ``resume`` names the run's own folder, or something in it."""
    return bool(cfg.resume) and Path(cfg.resume).resolve().is_relative_to(folder.resolve())


def own_step(folder: Path, checkpoint: Path | None) -> int | None:
    """Return the N of checkpoints/step-N, or None if this is not a checkpoint of the run in ``folder``."""
    own = {found.resolve(): int(found.name.removeprefix("step-")) for found in list_checkpoints(folder)}
    return own.get(checkpoint.resolve()) if checkpoint is not None else None


def is_from_same_run(folder: Path, checkpoint: Path, cfg: DictConfig) -> bool:
    """Return True if the run in ``folder`` wrote the checkpoint with exactly these settings."""
    return own_step(folder, checkpoint) is not None and not changed_settings(checkpoint, cfg)


def changed_settings(checkpoint: Path, cfg: DictConfig) -> list[str]:
    """Describe the settings that differ from those in the checkpoint's copy of config.yaml, which no rank is writing now."""
    before = _comparable_settings(read_config(checkpoint / "config.yaml"))
    now = _comparable_settings(resolve_without_environment(cfg))
    return [f"{key} was {old!r}, now {new!r}" for key, old, new in _differences(before, now)]


def find_own_checkpoint(folder: Path, cfg: DictConfig) -> Path | None:
    """Return the checkpoint from which the same command resumes in the same folder, or None if it starts from the beginning.

    ValueError if the folder holds another run, whose files would be mixed with this run's, or only damaged checkpoints.
    """
    if not (folder / "config.yaml").is_file():
        return None
    before = _comparable_settings(read_config(folder / "config.yaml"))
    if differing := _differences(before, _comparable_settings(resolve_without_environment(cfg))):
        key, old, new = differing[0]
        raise ValueError(
            f"output={folder} holds a run with other settings ({key} was {old!r}, now {new!r}): give another output=FOLDER; or "
            f"resume={folder}, to resume from its checkpoint with the new settings"
        )
    found = find_newest_checkpoint(folder)
    if found is None and list_checkpoints(folder):
        raise ValueError(
            f"output={folder}: every checkpoint of this run is damaged; to start again, give another output=FOLDER"
        )
    return found


def holds_same_run(folder: Path, cfg: DictConfig) -> bool:
    """Return True if ``folder`` holds a run with exactly these settings."""
    config = folder / "config.yaml"
    return config.is_file() and not _differences(
        _comparable_settings(read_config(config)), _comparable_settings(resolve_without_environment(cfg))
    )


def write_config(folder: Path, cfg: DictConfig) -> None:
    """Write config.yaml atomically, because other ranks may be reading it."""
    partial = folder / ".partial-config.yaml"
    OmegaConf.save(OmegaConf.create(resolve_without_environment(cfg)), partial)
    os.replace(partial, folder / "config.yaml")


def rewind(folder: Path, checkpoint: Path | None) -> None:
    """Restore the run's files to their state at its own checkpoint; remove them if the run starts anew or from another run's checkpoint.

    Newer checkpoints are set aside under another name, because the next start would resume from them. No checkpoint is deleted.
    """
    chosen = own_step(folder, checkpoint)
    for name in RECORDS:
        (folder / name).unlink(missing_ok=True)
        if chosen is not None and checkpoint is not None and (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, folder / name)
    (folder / "result.json").unlink(missing_ok=True)
    if chosen is None:
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()
    for partial in (folder / "checkpoints").glob(".partial-*"):
        shutil.rmtree(partial)
    for newer in list_checkpoints(folder):
        if chosen is None or int(newer.name.removeprefix("step-")) > chosen:
            log.warning("%s is set aside as %s", newer, set_aside(newer).name)
    best = folder / "checkpoints" / BEST
    if best.is_symlink() and not best.exists():  # it was set aside
        best.unlink()


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint to a free name that is not step-N. Return its new path."""
    name = f"passed-over-{checkpoint.name}"
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    target = next(checkpoint.with_name(free) for free in names if not checkpoint.with_name(free).exists())
    return checkpoint.rename(target)


def check_same_policy(saved: Mapping[str, "Tensor"], own: Mapping[str, "Tensor"]) -> None:
    """ValueError if a checkpoint's weights differ from this policy's in name or shape."""
    differ = [
        f"{name} is {_describe_shape(saved.get(name))} there and {_describe_shape(own.get(name))} here"
        for name in sorted(saved.keys() | own.keys())
        if _describe_shape(saved.get(name)) != _describe_shape(own.get(name))
    ]
    if saved and differ:
        raise ValueError(
            f"resume: the checkpoint belongs to another policy: {len(differ)} weights differ, {differ[0]}; "
            "use the policy and the adapter that wrote it (its config.yaml names them)"
        )


def check_iterations(done: int, iterations: int | None) -> None:
    """ValueError if the run would end before the iteration from which it resumes."""
    if iterations is not None and done > iterations:
        raise ValueError(
            f"trainer.max_epochs={iterations}: the checkpoint to resume from comes after {done} iterations; give at least {done}"
        )


def check_sharded(folder: Path, checkpoint: Path, cfg: DictConfig) -> None:
    """ValueError for a sharded checkpoint of another strategy, or of another run unless trust_checkpoint=true.

    PyTorch unpickles its metadata and its optimizer states, and a pickle can execute any code. A trainer.ckpt that is one file is read
    with ``weights_only=True``, which executes none.
    """
    state, weights = checkpoint / "trainer.ckpt", f"a new run from its weights with policy.path={checkpoint / 'policy'}"
    if not state.is_dir():
        return
    written_by = select(read_config(checkpoint / "config.yaml"), "trainer.strategy._target_")
    if written_by != OmegaConf.select(cfg, "trainer.strategy._target_"):
        raise ValueError(
            f"resume: {state} is sharded (one file per rank), and only the strategy that wrote it can read it: resume with that strategy "
            f"(trainer.devices=1 is enough), or start {weights}"
        )
    if own_step(folder, checkpoint) is None and not cfg.trust_checkpoint:
        raise ValueError(
            f"resume={cfg.resume}: {state} is sharded, and reading such a checkpoint executes any code that somebody put into it; if you "
            f"trust who wrote it, add trust_checkpoint=true; or start {weights}"
        )


def check_optimizer(checkpoint: Path, cfg: DictConfig) -> None:
    """ValueError if the checkpoint was written with another optimizer, whose state this one cannot use."""
    before = select(read_config(checkpoint / "config.yaml"), "optimizer._target_")
    now = OmegaConf.select(cfg, "optimizer._target_")
    if before != now:
        raise ValueError(
            f"optimizer._target_={now}: {checkpoint} holds the state of {before}; resume with that optimizer, or start a new run from the "
            f"weights only with policy.path={checkpoint / 'policy'}"
        )


def _comparable_settings(container: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without the output folder, so that a run that was copied or moved counts as the same run."""
    output = tuple(part for part in Path(str(container.get("output"))).parts if part not in (".", ".."))
    writers = {key: _relative_to_output(container[key], output) for key in ("logger", "callbacks") if key in container}
    kept = {str(key): value for key, value in container.items() if key not in ("resume", "trust_checkpoint", "output")}
    return kept | writers


def _relative_to_output(value: Any, output: tuple[str, ...]) -> Any:
    """Replace absolute paths inside the run's folder by paths relative to it."""
    if isinstance(value, dict):
        return {name: _relative_to_output(inner, output) for name, inner in value.items()}
    path = Path(value) if isinstance(value, str) else Path()
    own = next((p for p in (path, *path.parents) if path.is_absolute() and p.parts[-len(output) :] == output), None)
    return value if own is None else f"output/{path.relative_to(own)}"


def _differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """List (dotted key, old value, new value) for each setting that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        inner = [_differences(before.get(n), now.get(n), f"{key}.{n}" if key else str(n)) for n in names]
        return [difference for differences in inner for difference in differences]
    return [] if before == now else [(key, before, now)]


def _describe_shape(weight: "Tensor | None") -> str:
    return "missing" if weight is None else f"of shape {list(weight.shape)}"
