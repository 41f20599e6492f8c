"""A precision that is slow on this machine is named at the start."""

import pytest

from rlmod.training.precision import explain_slow_bf16


@pytest.mark.parametrize(
    ("precision", "dtype", "device", "flags", "named"),
    [
        ("bf16-mixed", "float32", "cpu", "fpu avx2 avx512f", ["trainer.precision=bf16-mixed", "trainer.precision=32-true"]),
        ("bf16-true", "bfloat16", "cpu", "avx2", ["bf16-true policy.dtype=bfloat16", "32-true policy.dtype=float32"]),
        ("32-true", "bfloat16", "cpu", "avx2", ["policy.dtype=bfloat16", "policy.dtype=float32"]),
        ("bf16-mixed", "float32", "cpu", "avx2 avx512_bf16", []),
        ("bf16-mixed", "float32", "cpu", "amx_bf16", []),
        ("bf16-mixed", "float32", "cuda", "avx2", []),
        ("32-true", "float32", "cpu", "avx2", []),
    ],
)  # fmt: skip
def test_bf16_on_a_cpu_without_it_is_named_with_what_is_faster(tmp_path, precision, dtype, device, flags, named):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    said = explain_slow_bf16(precision, dtype, device, tmp_path / "cpuinfo")
    assert (said is None) == (not named)
    assert all(words in said for words in named)


def test_an_unknown_cpu_is_not_judged(tmp_path):
    assert explain_slow_bf16("bf16-mixed", "float32", "cpu", tmp_path / "none") is None
