"""Rehearse every stage in its small form on a CPU: ``make gpu-rehearsal``. It fails if a stage does."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STAGES = ("core", "ceilings", "exact", "bench", "head", "attention", "memory", "sampler", "precision", "train")
REAL = ("real_convert", "real_train")
"""Stages of the real policy; they run if ``prepare.py --real`` has fetched its pieces."""
LIMIT = 3000  # a loaded machine is slow; unloaded it takes two minutes


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "SMALL": "1", "OUT": folder, "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        if not Path(".gpu/r1").is_dir():
            environment["GPU_FILES"] = f"{folder}/none"
        stages = (*STAGES, *REAL) if Path(".gpu/r1").is_dir() else STAGES
        command = [sys.executable, "tools/gpu/device.py", str(LIMIT), *(f"{name}=900" for name in stages)]
        subprocess.run(command, env=environment, check=True)
        found = json.loads((Path(folder) / "results.json").read_text())
    if failed := {name: answer for name, answer in found.items() if answer.get("status") != 0}:
        raise SystemExit(f"failed: {json.dumps(failed, indent=1)}")
    print(f"{len(found)} stages rehearsed")


if __name__ == "__main__":
    main()
