"""Precisions that are slow on this machine."""

from pathlib import Path

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Names of a CPU's bfloat16 instructions in /proc/cpuinfo: two of x86, one of Arm."""


def explain_slow_bf16(precision: str, dtype: str, device: str, cpu: Path = Path("/proc/cpuinfo")) -> str | None:
    """Return a sentence if a run computes in bfloat16 on a CPU that has no instructions for it, else None.

    ``precision`` is trainer.precision, ``dtype`` policy.dtype, ``device`` the type of the device that trains.
    """
    slow = [f"trainer.precision={precision}"] if precision.startswith("bf16") else []
    faster = ["trainer.precision=32-true"] if slow else []
    if dtype == "bfloat16":
        slow, faster = [*slow, "policy.dtype=bfloat16"], [*faster, "policy.dtype=float32"]
    if device != "cpu" or not slow or not cpu.is_file() or BF16_FLAGS & set(cpu.read_text(encoding="utf-8").split()):
        return None
    return f"{' '.join(slow)} on a CPU without bfloat16 instructions is 5 to 10 times slower than {' '.join(faster)}"
