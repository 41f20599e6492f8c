"""``rlmod-serve policy.path=Qwen/Qwen2.5-7B engine.tensor_parallel_size=4``: vLLM's own server, for ``sampler=vllm_server``."""

import json
import os
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod.config import cli


def serve(cfg: DictConfig) -> None:
    """Becomes the server, which has the policy's shape and tokenizer but no weights: a run hands them over."""
    from rlmod.config.validation import check_types
    from rlmod.sampler._vllm_environment import check_torch_extensions, explain_missing_vllm

    for key in ("policy", "sampler"):
        check_types(cfg[key], key)
    if not str(cfg.sampler._target_).endswith("VLLMServer"):
        raise ValueError(f"rlmod-serve is for sampler=vllm_server, not for {cfg.sampler._target_}")
    if find_spec("vllm") is None:
        raise ValueError(explain_missing_vllm("sampler=vllm_server"))
    sampler, policy = instantiate(cfg.sampler), instantiate(cfg.policy)
    address = urlparse(sampler.url)
    host, port = address.hostname or "127.0.0.1", address.port or 8000
    _check_free(host, port)
    check_torch_extensions()
    folder = Path(cfg.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    policy.tokenizer().save_pretrained(folder)
    policy.shape().save_pretrained(folder)
    settings = {
        "host": host,
        "port": port,
        "dtype": cfg.dtype,
        "load_format": "dummy",
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": "rlmod"},
        **(OmegaConf.to_container(cfg.engine) or {}),  # pyright: ignore[reportGeneralTypeIssues]
    }
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    command = [sys.executable, "-m", *_server(folder), *_flags(settings)]
    print(f"{' '.join(command[2:])}\nready when {sampler.url}/health answers", flush=True)
    os.execve(sys.executable, command, environment)


def _server(folder: Path) -> list[str]:
    """``vllm serve`` asks for the version of the package vllm, which the CPU's build is not called."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return ["vllm.entrypoints.cli.main", "serve", str(folder)]


def _flags(settings: dict[str, object]) -> list[str]:
    """Return flags of ``vllm serve``: ``--load-format dummy``; a switch alone, or with ``no-`` before its name."""
    flags: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return flags


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"sampler.url=http://{host}:{port}: cannot listen there ({error.strerror}); give an address of this machine and a port "
                "that is free"
            ) from error


def main() -> None:
    cli.run(serve, "serve")


if __name__ == "__main__":
    main()
