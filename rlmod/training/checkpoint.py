"""Checkpoints and resuming: the newest intact checkpoint of a run, and its files as they were then."""

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

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MANIFEST = "complete.json"
"""Manifest of a checkpoint: the size of each of its files."""
RECORDS = ("metrics.csv", "samples.jsonl")
"""Files that a run writes line by line. A checkpoint has a copy, so that a resumed run repeats no line and lacks none."""


def seal(folder: Path) -> None:
    """Notes what a checkpoint is made of: the last thing that is written into it."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n")
    for path in (*folder.rglob("*"), folder):  # or a name might be on the disk before what it names, and the power go
        on_disk(path)


def on_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is intact."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    if not isinstance(sizes, dict) or not sizes or not all(isinstance(size, int) for size in sizes.values()):
        return f"its {MANIFEST} does not hold the sizes of files"
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found:,} of {size:,} bytes"
    return None


def _unreadable(folder: Path) -> str | None:
    """Return why the trainer's state cannot be read. Weights are not read; a sharded state is left to the strategy."""
    state = folder / "trainer.ckpt"
    if state.is_file():
        try:
            with zipfile.ZipFile(state) as parts:  # as torch.save writes them
                for part in parts.infolist():
                    with parts.open(part) as stream:
                        stream.read(-1 if part.filename.endswith("data.pkl") else 0)
        except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
            return f"trainer.ckpt cannot be read ({error})"
    return None


def checkpoints(run: Path) -> list[Path]:
    """A run's, oldest first."""
    found = [folder for folder in (run / "checkpoints").glob("step-*") if folder.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def newest(place: Path) -> Path:
    """The newest whole checkpoint in ``place``, a run's folder or a checkpoint's own; broken ones are named and passed over."""
    found = newest_whole(place)
    if found is None:
        raise ValueError(
            f"resume={place}: no whole checkpoint there; give a run's folder (with checkpoints/step-* in it), or one of those"
        )
    return found


def newest_whole(place: Path) -> Path | None:
    candidates = [place] if (place / MANIFEST).is_file() or (place / "trainer.ckpt").exists() else checkpoints(place)
    for folder in reversed(candidates):
        broken = damage(folder) or _unreadable(folder)
        if broken is None:
            return folder
        if distributed.is_rank_zero():
            log.warning("the checkpoint %s is broken and is passed over: %s", folder, broken)
    return None


def start(folder: Path, cfg: DictConfig) -> Path | None:
    """The checkpoint that a run in ``folder`` resumes from; None where it has to begin.

    A checkpoint of its own that ``resume`` names, or the newest of its own, or what ``resume`` names elsewhere: in this order, so that
    the same command goes on where it was killed.
    """
    if not asks_for_own(folder, cfg):
        return left_off(folder, cfg) or (newest(Path(cfg.resume)) if cfg.resume else None)
    chosen = newest(Path(cfg.resume))
    if step(folder, chosen) is None:
        raise ValueError(
            f"resume={cfg.resume} is in the run's own folder, but not one of its checkpoints/step-N: give one of those, or another "
            "output=FOLDER"
        )
    return chosen


def asks_for_own(folder: Path, cfg: DictConfig) -> bool:
    """Return True if ``resume`` names the run's own folder, or something in it."""
    return bool(cfg.resume) and Path(cfg.resume).resolve().is_relative_to(folder.resolve())


def step(folder: Path, checkpoint: Path | None) -> int | None:
    """The N of checkpoints/step-N; None for what is not a checkpoint of the run in ``folder``."""
    own = {found.resolve(): int(found.name.removeprefix("step-")) for found in checkpoints(folder)}
    return own.get(checkpoint.resolve()) if checkpoint is not None else None


def is_own(folder: Path, checkpoint: Path, cfg: DictConfig) -> bool:
    """Return True if the run in ``folder`` made the checkpoint with exactly these settings."""
    return step(folder, checkpoint) is not None and not changed(checkpoint, cfg)


def changed(checkpoint: Path, cfg: DictConfig) -> list[str]:
    """Return the settings that differ from those in the checkpoint's own config.yaml, which no rank is writing now."""
    before = _plain(OmegaConf.load(checkpoint / "config.yaml"))
    return [f"{key} was {old!r}, now {new!r}" for key, old, new in _differences(before, _plain(cfg))]


def left_off(folder: Path, cfg: DictConfig) -> Path | None:
    """The checkpoint from which the same command goes on in the same folder; None where it has to begin.

    ValueError where the folder holds another run, whose files would be mixed with this one's, or broken checkpoints alone.
    """
    if not (folder / "config.yaml").is_file():
        return None
    if differing := _differences(_plain(OmegaConf.load(folder / "config.yaml")), _plain(cfg)):
        key, before, now = differing[0]
        raise ValueError(
            f"output={folder} holds a run with other settings ({key} was {before!r}, now {now!r}): give another output=FOLDER; or "
            f"resume={folder}, to resume from its checkpoint with the new settings"
        )
    found = newest_whole(folder)
    if found is None and checkpoints(folder):
        raise ValueError(
            f"output={folder}: every checkpoint of this run is broken; to begin anew, give another output=FOLDER"
        )
    return found


def same_run(folder: Path, cfg: DictConfig) -> bool:
    config = folder / "config.yaml"
    return config.is_file() and not _differences(_plain(OmegaConf.load(config)), _plain(cfg))


def note_config(folder: Path, cfg: DictConfig) -> None:
    """Writes config.yaml whole or not at all: other ranks may be reading it."""
    partial = folder / ".partial-config.yaml"
    OmegaConf.save(cfg, partial, resolve=True)
    os.replace(partial, folder / "config.yaml")


def rewind(folder: Path, checkpoint: Path | None) -> None:
    """The run's files as they were at its own checkpoint, or none of them where it begins (anew, or from another run's).

    Newer checkpoints are set aside, or the next start would resume from them; no checkpoint is deleted.
    """
    chosen = step(folder, checkpoint)
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
    for newer in checkpoints(folder):
        if chosen is None or int(newer.name.removeprefix("step-")) > chosen:
            log.warning("%s is set aside, as %s", newer, _set_aside(newer).name)


def _set_aside(checkpoint: Path) -> Path:
    name = f"passed-over-{checkpoint.name}"
    names = chain([name], (f"{name}-{again}" for again in count(2)))
    target = next(checkpoint.with_name(free) for free in names if not checkpoint.with_name(free).exists())
    return checkpoint.rename(target)


def check_same_policy(saved: Mapping[str, "Tensor"], own: Mapping[str, "Tensor"]) -> None:
    """ValueError where a checkpoint's weights are not those of this policy."""
    differ = [
        f"{name} is {_shape(saved.get(name))} there and {_shape(own.get(name))} here"
        for name in sorted(saved.keys() | own.keys())
        if _shape(saved.get(name)) != _shape(own.get(name))
    ]
    if saved and differ:
        raise ValueError(
            f"resume: the checkpoint is of another policy: {len(differ)} weights differ, {differ[0]}; "
            "give the policy and the adapter that it was made with (its config.yaml names them)"
        )


def check_iterations(done: int, iterations: int | None) -> None:
    """ValueError where a run that goes on is to end before where it goes on."""
    if iterations is not None and done > iterations:
        raise ValueError(
            f"trainer.max_epochs={iterations}: the checkpoint to resume from comes after {done} iterations; give at least as many"
        )


def check_optimizer(checkpoint: Path, cfg: DictConfig) -> None:
    """ValueError where it was another one: what it has in its state is nothing to this one."""
    before, now = (OmegaConf.select(c, "optimizer._target_") for c in (OmegaConf.load(checkpoint / "config.yaml"), cfg))
    if before != now:
        raise ValueError(
            f"optimizer._target_={now}: {checkpoint} holds the state of {before}; resume with that one, or begin a run with the weights "
            f"alone, policy.path={checkpoint / 'policy'}"
        )


def _plain(cfg: Any) -> dict[str, Any]:
    """Without where it is written, so that a run that was copied or moved is the same run."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    output = tuple(part for part in Path(str(container.get("output"))).parts if part not in (".", ".."))
    writers = {key: _placed(container[key], output) for key in ("logger", "callbacks") if key in container}
    kept = {str(key): value for key, value in container.items() if key not in ("resume", "output")}
    return kept | writers


def _placed(value: Any, output: tuple[str, ...]) -> Any:
    """Folders in the run's own, from there on."""
    if isinstance(value, dict):
        return {name: _placed(inner, output) for name, inner in value.items()}
    path = Path(value) if isinstance(value, str) else Path()
    own = next((p for p in (path, *path.parents) if path.is_absolute() and p.parts[-len(output) :] == output), None)
    return value if own is None else f"output/{path.relative_to(own)}"


def _differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        inner = [_differences(before.get(n), now.get(n), f"{key}.{n}" if key else str(n)) for n in names]
        return [difference for differences in inner for difference in differences]
    return [] if before == now else [(key, before, now)]


def _shape(weight: "Tensor | None") -> str:
    return "missing" if weight is None else f"of shape {list(weight.shape)}"
