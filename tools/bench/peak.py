"""Peak memory of a stretch of code on a CPU (Linux, glibc): tensors in pages of their own, and the kernel's high-water mark."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
LIBC, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -3, -4
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def own_pages() -> None:
    """From here on every tensor above 64 KiB goes back to the system when it is freed. Costs time: not while time is measured."""
    LIBC.mallopt(M_MMAP_THRESHOLD, 2**16)


def recycled_pages() -> None:
    """Keep freed memory below 32 MiB for the next tensor, as glibc does after a while."""
    LIBC.mallopt(M_MMAP_MAX, 2**16)
    LIBC.mallopt(M_MMAP_THRESHOLD, 2**25)


def kept_pages() -> None:
    """Tensors of any size are made in pages that are kept: above 32 MiB, fresh ones from the system cost more than most arithmetic."""
    LIBC.mallopt(M_MMAP_MAX, 0)
    LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def start() -> int:
    """Resets the high-water mark, once what is free is given back; the bytes that are resident now."""
    gc.collect()
    LIBC.malloc_trim(0)
    CLEAR.write_text("5")
    return _read("VmRSS")


def since(resident: int) -> int:
    """Bytes that the process held at most since ``start``, above what it held then."""
    return _read("VmHWM") - resident


def of(function: Callable[[], T]) -> tuple[T, int]:
    """Call the function; return its result, and the most memory it held at once, the result included."""
    resident = start()
    result = function()
    return result, since(resident)


def _read(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
