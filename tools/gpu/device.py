"""Run stages on the GPU machine, in the checkout's root: ``python3 tools/gpu/device.py SECONDS STAGE...``; a stage is NAME or NAME=SECONDS.

Each stage is a process of its own with a limit of its own; none begins that cannot have 15 s. After each, ``$OUT/results.json`` is
complete, so the call may be stopped at any time. The text of all stages is in ``$OUT/log.txt``. Pieces of ``.gpu/`` that come with one
call are kept in the machine's temporary folder: the checkout there is laid anew for each call.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
TMP = Path(tempfile.gettempdir())
OUT = Path(os.environ.get("OUT", TMP / "out"))
GPU = Path(os.environ.get("GPU_FILES", ".gpu"))
KEPT, SITE, VLLM_SITE = TMP / "gpu-pieces", TMP / "site", TMP / "vllm-site"
LEAST = 15.0
LIMITS = {
    "core": 40, "ceilings": 40, "exact": 60, "bench": 150, "head": 60, "attention": 60, "memory": 70, "sampler": 80,
    "precision": 90, "train": 120, "unpack": 60, "real_convert": 90, "real_train": 250, "real_compare": 400,
    "vllm_import": 90, "vllm_train": 150, "vllm_speed": 150,
}  # fmt: skip
NEEDS_REAL, NEEDS_VLLM = ("real_convert", "real_train", "real_compare"), ("vllm_import", "vllm_train", "vllm_speed")


class Results:
    """``results.json``, complete after each stage, whatever a stage has said."""

    def __init__(self, folder: Path) -> None:
        self.file, self.found = folder / "results.json", {}
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, stage: str, answer: dict[str, Any]) -> None:
        self.found[stage] = answer
        partial = self.file.with_suffix(".new")
        partial.write_text(json.dumps(self.found, indent=1, default=str))
        os.replace(partial, self.file)
        print(f"== {stage}: {json.dumps(answer, default=str)[:1500]}", flush=True)


def keep_pieces() -> None:
    for part in sorted(GPU.glob("[rv][0-9]*/part")):
        target = KEPT / part.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(part, target / "part")
    for manifest in (GPU / "core").glob("*.json"):
        KEPT.mkdir(parents=True, exist_ok=True)
        shutil.copy(manifest, KEPT / manifest.name)


def join(letter: str, name: str) -> bytes | str:
    """Return the joined pieces, or why that cannot be."""
    manifest = KEPT / f"{name}.json"
    if not manifest.is_file():
        return f"no {name}.json came along: prepare.py --{name}"
    wanted = json.loads(manifest.read_text())
    parts = [KEPT / f"{letter}{number}" / "part" for number in range(1, wanted["pieces"] + 1)]
    if missing := [part.parent.name for part in parts if not part.is_file()]:
        return f"pieces missing: {', '.join(missing)}"
    data = b"".join(part.read_bytes() for part in parts)
    return data if hashlib.sha256(data).hexdigest() == wanted["sha256"] else "the joined pieces have another digest"


def unpack_real() -> str | None:
    if (TMP / "real.gguf").is_file():
        return None
    data = join("r", "real")
    if isinstance(data, str):
        return data
    (TMP / "real.gguf").write_bytes(data)
    return None


def unpack_vllm() -> str | None:
    if (VLLM_SITE / "vllm").is_dir():
        return None
    data = join("v", "vllm")
    if isinstance(data, str):
        return data
    archive = TMP / "vllm.zip"
    archive.write_bytes(data)
    with zipfile.ZipFile(archive) as source:
        source.extractall(VLLM_SITE)
    return None


def install() -> None:
    """Install the wheels that came along, and give rlmod the metadata that its version and vLLM's plug-in are read from."""
    wheels = sorted(map(str, (GPU / "core").glob("*.whl")))
    if wheels and not (SITE / "hydra").is_dir():
        quiet = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(SITE)]
        subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *wheels], check=True)
    metadata = SITE / "rlmod-0.1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rlmod\nVersion: 0.1.0\n")
    plug_in = "[vllm.general_plugins]\nrlmod = rlmod.sampler._vllm_worker:register\n"
    (metadata / "entry_points.txt").write_text(plug_in)


def run_stage(name: str, limit: float) -> dict[str, Any]:
    began, answer = time.monotonic(), OUT / f".{name}"
    environment = {
        **os.environ, "PYTHONUNBUFFERED": "1", "ANSWER": str(answer), "OUT": str(OUT), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": ":".join(map(str, (Path.cwd(), SITE, VLLM_SITE))), "VLLM_CACHE_ROOT": str(TMP / "vllm-cache"),
        "GPU_FILES": str(GPU), "RLMOD_CACHE": str(TMP / "rlmod-cache"),
    }  # fmt: skip
    with open(OUT / "log.txt", "a") as log:
        log.write(f"\n==== {name}\n")
        log.flush()
        command = [sys.executable, "-m", "tools.gpu.stages", name]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            status: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = "stopped at its limit"
    said: dict[str, Any] = {}
    if answer.is_file():
        for line in answer.read_text().splitlines():
            said |= json.loads(line)
        answer.unlink()
    tail = {"tail": (OUT / "log.txt").read_text()[-1200:]} if status else {}
    return {"status": status, "wall": round(time.monotonic() - began, 1), "found": said, **tail}


def main() -> None:
    budget, words = float(sys.argv[1]), sys.argv[2:]
    results = Results(OUT)
    keep_pieces()
    install()
    for word in words:
        name, _, own = word.partition("=")
        left = budget - (time.monotonic() - STARTED)
        limit = min(float(own or LIMITS[name]), left - 5)
        why = unpack_real() if name in NEEDS_REAL else unpack_vllm() if name in (*NEEDS_VLLM, "unpack") else None
        if why is not None:
            results.note(name, {"skipped": why})
        elif name == "unpack":
            results.note(name, {"status": 0})
        elif limit < LEAST:
            results.note(name, {"skipped": f"{left:.0f} s left"})
        else:
            results.note(name, run_stage(name, limit))


if __name__ == "__main__":
    main()
