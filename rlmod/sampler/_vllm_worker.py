"""A plug-in for vLLM workers, which receives the policy's weights through vLLM's weight-transfer interface.

vLLM loads it in every process of an engine, through the entry point ``rlmod`` of the group ``vllm.general_plugins``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory  # pyright: ignore[reportMissingImports]
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload  # pyright: ignore[reportMissingImports]

from rlmod.sampler._weights import read_weights

BACKEND = "rlmod"
TIMEOUT = 60.0
"""Seconds without a byte, after which a transfer of weights fails."""


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Empty: the transfer needs no initialization."""


@dataclass
class WeightSource(WeightTransferUpdateInfo):
    """The source of the weights: this process, or a URL."""

    weights: Any = None
    url: str | None = None


class WeightReceiver(WeightTransferEngine[NoInitInfo, WeightSource]):
    init_info_cls, update_info_cls = NoInitInfo, WeightSource

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: WeightSource) -> None:
        if update_info.url is None:
            self.model.load_weights(update_info.weights)
            return
        with urlopen(update_info.url, timeout=TIMEOUT) as response:
            self.model.load_weights(self._move_to_device(read_weights(response)))

    def _move_to_device(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            yield name, weight.to(self.device)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        if head is not None and getattr(self.model_config.hf_config, "tie_word_embeddings", False):
            # A tied head has no weights that would be reloaded. On a CPU it keeps a packed copy, which would stay outdated.
            head.quant_method.process_weights_after_loading(head)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        pass


def register() -> None:
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)
