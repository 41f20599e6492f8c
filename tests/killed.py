"""A run that is killed again and again, against the same run in one piece."""

import json
import random
import time
from pathlib import Path

from tests.processes import ended, kill, started, wait_until
from tests.runs import metrics


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    names = [folder.name.removeprefix("step-") for folder in run.glob("checkpoints/step-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def check_killed_equals_whole(
    tmp_path: Path, settings: tuple[str, ...], iterations: int, kills: int, early: int = 0, updates: int = 1
) -> None:
    """Kill a run with SIGKILL at random moments, start it again each time, and compare it with a run in one piece, bit for bit.

    ``kills`` of the moments follow the checkpoint of a random iteration; ``early`` ones are in the first seconds of a process, while it
    loads. ``updates`` is the number of optimizer steps per iteration.
    """
    settings = (
        *settings,
        f"trainer.max_epochs={iterations}",
        "callbacks.checkpoints.every=1",
        "trainer.check_val_every_n_epoch=5",
    )
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    ended(started(*settings, f"output={whole}"), seconds=1800)
    draw = random.Random(kills)
    moments: list[int | None] = [*sorted(draw.sample(range(1, iterations - 1), kills)), *[None] * early]
    for place in range(kills, len(moments)):  # the early ones between the others
        moments.insert(draw.randrange(place), moments.pop())
    for iteration in moments:
        process = started(*settings, f"output={folder}")
        try:
            if iteration is not None:
                wait_until(lambda step=iteration * updates: newest_step(folder) >= step, process, seconds=600)
            time.sleep(draw.random() * (0.5 if iteration is not None else 8))
        finally:
            kill(process)
    assert "resuming from" in ended(started(*settings, f"output={folder}"), seconds=1800)
    assert metrics(folder) == metrics(whole)
    newest = [run / "checkpoints" / f"step-{iterations * updates:06d}" / "policy" for run in (folder, whole)]
    (weights,) = [file.name for file in newest[1].glob("*.safetensors")]
    assert (newest[0] / weights).read_bytes() == (newest[1] / weights).read_bytes()
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in (folder, whole)]
    for key in ("held_out", "steps", "tokens", "completed"):
        assert results[0][key] == results[1][key]
