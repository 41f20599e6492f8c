"""A folder of files that are computed once, because the data is large. A file is there as a whole or not at all, and is checked when read.

A file is a payload, then a trailer: JSON with facts about the payload, its length and its checksum. The name of a file holds the hash of
all that decides its contents, so a file never has to be updated.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import mmap
import os
import struct
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlmod import distributed
from rlmod.model.cache_folder import VARIABLE, cache_folder, hash_file

log = logging.getLogger(__name__)

LARGE = 50_000
"""Number of problems beyond which they and their tokens live in files."""
WAIT_SECONDS = 600.0
"""Time for which a process waits for another one that writes the same file, unless the caller says otherwise."""
STALE_SECONDS = 24 * 3600.0
"""Age beyond which an unfinished file counts as left behind by a killed process."""
MAGIC = b"rlmod\x00c1"
END = struct.Struct("<QI8s")
"""Last bytes of a file: length and checksum of the trailer, and MAGIC."""
BLOCK = 1 << 20


@dataclass(frozen=True)
class Stored:
    """A payload that is mapped into memory, with its facts."""

    payload: memoryview
    facts: dict[str, Any]
    mapped: mmap.mmap | None
    """The mapping, whose pages may be dropped from memory: they are read again from the file."""

    def forget(self) -> None:
        """Drop the pages from this process's memory after a pass over all of them."""
        if self.mapped is not None:
            self.mapped.madvise(mmap.MADV_DONTNEED)


class Writer:
    """Writes a payload to a file of its own, which ``publish`` gives its name, or which ends with this object."""

    def __init__(self) -> None:
        folder = cache_folder()
        place = folder if folder is not None and is_writable(folder) else Path(tempfile.gettempdir())
        place.mkdir(parents=True, exist_ok=True)  # the user may have removed the folder meanwhile
        _remove_stale(place)
        descriptor, name = tempfile.mkstemp(dir=place, prefix=".partial-rlmod-")
        self.path, self.file = Path(name), cast(BinaryIO, os.fdopen(descriptor, "wb"))
        self.length, self.checksum, self.digest = 0, 0, hashlib.sha256()
        self.remove = weakref.finalize(self, _remove, self.path, os.getpid())
        self.closed = False

    def write(self, data: Any) -> int:
        """Append to the payload."""
        view = memoryview(data).cast("B")
        with self._naming_the_folder():
            self.file.write(view)
        self.checksum = zlib.crc32(view, self.checksum)
        self.digest.update(view)
        self.length += len(view)
        return len(view)

    def tell(self) -> int:
        return self.length

    @contextlib.contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        """Raise ValueError that names the folder and the variable if the file cannot be written to its end."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"the data is large, so it goes to a file in {self.path.parent}, which cannot be written to its end ({error}): make room, "
                f"or name another folder in the environment variable {VARIABLE}"
            ) from error

    def flush(self) -> None:
        with self._naming_the_folder():  # the last bytes are in a buffer until here
            self.file.flush()

    def close(self) -> None:
        """Do nothing: the file stays open for its trailer."""

    def stored(self, facts: dict[str, Any]) -> Stored:
        """Map the payload that has been written so far."""
        self.flush()
        return _map(self.path, self.length, facts)

    def publish(self, target: Path, facts: dict[str, Any]) -> None:
        """Append the trailer, and give the file its name."""
        record = {**facts, "name": target.name, "length": self.length, "checksum": self.checksum}
        trailer = json.dumps(record).encode()
        with self._naming_the_folder():
            self.file.write(trailer + END.pack(len(trailer), zlib.crc32(trailer), MAGIC))
            self.file.flush()
            os.fsync(self.file.fileno())  # otherwise a crash of the machine could leave the name without the contents
            os.fchmod(self.file.fileno(), 0o666 & ~_umask())  # a temporary file is the user's own
            os.replace(self.path, target)
        self.remove.detach()
        self.file.close()


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@functools.lru_cache
def is_writable(folder: Path) -> bool:
    """Return True if files can be written to the folder, which is created. Log a warning, once, if they cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        log.warning(
            "the cache folder %s cannot be written (%s), so large data is read and tokenized anew at each start; name another folder in "
            "the environment variable %s",
            *(folder, error, VARIABLE),
        )
        return False


def hash_key(*parts: object) -> str:
    """Return the hash of values that JSON can hold, and of paths. TypeError for other values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=os.fspath).encode()).hexdigest()[:40]


@functools.lru_cache
def hash_code(*places: str) -> str:
    """Return the hash of rlmod's modules in these folders, or of these files, with the versions of the libraries that they call."""
    root = Path(__file__).parents[1]
    files = sorted(
        file for place in places for file in ([root / place] if "." in place else (root / place).glob("*.py"))
    )
    sources = [hash_file(file) for file in files if file.is_file()]
    return hash_key(sources, [_version(name) for name in ("rlmod", "pyarrow", "transformers", "tokenizers", "jinja2")])


def obtain(name: str, make: Callable[[], tuple[Writer, dict[str, Any]] | None], seconds: float) -> Stored | None:
    """Return the file of this name from the cache. If there is none, one process of the node makes it, and the others wait for it.

    ``make`` returns a payload with its facts, or None if nothing is worth keeping: then the result is None on all ranks, as it is
    without a cache. ValueError on a rank that has waited for longer than ``seconds``.
    """
    folder = cache_folder()
    if folder is None:
        return None
    target = folder / name
    if (found := read_stored(target)) is None:
        if not is_writable(folder):
            return None
        found = _make(target, make, seconds) if distributed.is_first_on_node() else _wait(target, seconds)
    return None if found.facts.get("nothing") else found


def _make(target: Path, make: Callable[[], tuple[Writer, dict[str, Any]] | None], seconds: float) -> Stored:
    with _only_writer(target, seconds):
        if (found := read_stored(target, warn=False)) is not None:  # another run has written it meanwhile
            return found
        writer, facts = make() or (Writer(), {"nothing": True})
        stored = writer.stored(facts)
        writer.publish(target, facts)
        return stored


def _wait(target: Path, seconds: float) -> Stored:
    deadline = time.monotonic() + seconds
    while (found := read_stored(target, warn=False)) is None:
        if time.monotonic() > deadline:
            raise ValueError(
                f"rank 0 of this node has not written {target} within guard.rank_timeout={seconds:.0f} s: raise guard.rank_timeout, "
                f"or let the ranks of a node share the folder in the environment variable {VARIABLE}"
            )
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def _only_writer(target: Path, seconds: float) -> Iterator[None]:
    """Hold the file's lock, which ends with the process. Go on without it after ``seconds``: two writers only do the work twice."""
    lock = target.with_name(f".lock-{target.name}")
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            log.warning("%s cannot be opened (%s), so this process writes without a lock", lock, error)
            yield
            return
        held = _try_lock(descriptor)
        if held and _is_same_file(descriptor, lock):
            break
        if time.monotonic() > deadline:
            log.warning("another process has held %s for %.0f s; this one no longer waits for it", lock, seconds)
            break
        if not (held or told):
            log.warning("waiting for another process, which writes %s", target)
            told = True
        os.close(descriptor)
        time.sleep(0.0 if held else 0.2)
    try:
        yield
    finally:
        if held:
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Return False if the holder before has removed the file: then the lock is not on the file that others open."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def read_stored(path: Path, warn: bool = True) -> Stored | None:
    """Map a file of the cache. None if there is none, or, with a warning, if it is not whole."""
    try:
        with path.open("rb") as file:
            facts = _read_trailer(file, path.name)
            _check_payload(file, facts)
        return _map(path, facts["length"], facts)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        if warn:
            log.warning("%s may not be read (%s): it belongs to another user; it is written anew", path, error)
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if warn:
            log.warning("%s is not a whole file of the cache (%s), so it is written anew", path, error)
        return None


def _read_trailer(file: BinaryIO, name: str) -> dict[str, Any]:
    size = file.seek(0, os.SEEK_END)
    if size < END.size:
        raise ValueError("it is too short")
    file.seek(size - END.size)
    length, checksum, magic = END.unpack(file.read(END.size))
    if magic != MAGIC or length > size - END.size:
        raise ValueError("its end is missing")
    file.seek(size - END.size - length)
    trailer = file.read(length)
    if zlib.crc32(trailer) != checksum:
        raise ValueError("its trailer is damaged")
    facts = json.loads(trailer)
    if facts["name"] != name:
        raise ValueError(f"it was written as {facts['name']}")
    if facts["length"] != size - END.size - length:
        raise ValueError("its length is wrong")
    return facts


def _check_payload(file: BinaryIO, facts: dict[str, Any]) -> None:
    # Read, not mapped: mapped pages would count as this process's memory.
    block, checksum, left = memoryview(bytearray(BLOCK)), 0, facts["length"]
    file.seek(0)
    while left:
        number = file.readinto(block[: min(left, BLOCK)])  # pyright: ignore[reportAttributeAccessIssue]
        if not number:
            raise ValueError("it is too short")
        checksum = zlib.crc32(block[:number], checksum)
        left -= number
    if checksum != facts["checksum"]:
        raise ValueError("its checksum is wrong")


def _map(path: Path, length: int, facts: dict[str, Any]) -> Stored:
    if not length:
        return Stored(memoryview(b""), facts, None)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)
    return Stored(memoryview(mapped), facts, mapped)


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child has a copy of the writer
        path.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Remove unfinished files that killed processes have left behind."""
    for file in folder.glob(".partial-rlmod-*"):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < time.time() - STALE_SECONDS:
                file.unlink()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
