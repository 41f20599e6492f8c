"""Start a vLLM server for ``sampler=vllm_server``: ``rlmod-serve policy.path=Qwen/Qwen2.5-7B engine.tensor_parallel_size=4``."""

import json
import os
import socket
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlmod.config import cli


def serve(cfg: DictConfig) -> None:
    """Replace this process by the server. It has the policy's config and tokenizer but no weights; the training run transfers them."""
    from rlmod.config.validation import check_types
    from rlmod.sampler._access import KEY_VARIABLE, WEIGHTS_VARIABLE, ServerAccess
    from rlmod.sampler._server import stored_secret
    from rlmod.sampler._vllm_environment import check_torch_extensions, explain_missing_vllm

    for key in ("policy", "sampler"):
        check_types(cfg[key], key)
    if not str(cfg.sampler._target_).endswith("VLLMServer"):
        raise ValueError(f"rlmod-serve needs sampler=vllm_server, got {cfg.sampler._target_}")
    if not entry_points(group="vllm.general_plugins", name="rlmod"):
        raise ValueError(
            "rlmod-serve: rlmod is on Python's path but not installed, and vLLM finds only the plug-ins of installed packages; "
            "run pip install --editable . in rlmod's folder"
        )
    if find_spec("vllm") is None:
        raise ValueError(explain_missing_vllm("sampler=vllm_server"))
    sampler, policy = instantiate(cfg.sampler), instantiate(cfg.policy)
    address = urlparse(sampler.url)
    host, port = address.hostname or "127.0.0.1", address.port or 8000
    _check_address_is_free(host, port)
    check_torch_extensions()
    folder = Path(cfg.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    policy.tokenizer().save_pretrained(folder)
    policy.shape().save_pretrained(folder)
    weights = folder / "weights.json"
    weights.write_text(json.dumps(_weight_shapes(policy.skeleton())), encoding="utf-8")
    settings = {
        "host": host,
        "port": port,
        "dtype": cfg.dtype,
        "load_format": "dummy",
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": "rlmod"},
        **(OmegaConf.to_container(cfg.engine) or {}),  # pyright: ignore[reportGeneralTypeIssues]
        "api_server_count": 1,  # the lease is held in the process that answers requests
    }
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    # vLLM's other front end does not run the middleware.
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_RUST_FRONTEND": "0", WEIGHTS_VARIABLE: str(weights)}
    given = KEY_VARIABLE
    if not environment.get(KEY_VARIABLE):
        key_file = folder / "api_key"
        environment[KEY_VARIABLE], given = stored_secret(key_file), f"sampler.api_key_file={key_file}"
    access = ["--middleware", f"{ServerAccess.__module__}.{ServerAccess.__name__}"]
    command = [sys.executable, "-m", *_server_module(folder), *_format_flags(settings), *access]
    print(f"{' '.join(command[2:])}\nruns on {sampler.url} need {given}; they wait until it is up", flush=True)
    os.execve(sys.executable, command, environment)


def _weight_shapes(model: Any) -> dict[str, list[int]]:
    """Return the shape of each weight of a policy, by name, as a run would send it."""
    return {name: list(weight.shape) for name, weight in model.named_parameters()}


def _server_module(folder: Path) -> list[str]:
    """Return the module that serves, with its arguments. ``vllm serve`` needs a package named vllm; the CPU build has another name."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return ["vllm.entrypoints.cli.main", "serve", str(folder)]


def _format_flags(settings: dict[str, object]) -> list[str]:
    """Return the flags of ``vllm serve``, such as ``--load-format dummy``; a boolean is ``--name`` or ``--no-name``."""
    flags: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return flags


def _check_address_is_free(host: str, port: int) -> None:
    """Raise ValueError if the server cannot listen on this address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"sampler.url=http://{host}:{port}: cannot listen there ({error.strerror}); give an address of this machine and a "
                "free port"
            ) from error


def main() -> None:
    cli.run(serve, "serve")


if __name__ == "__main__":
    main()
