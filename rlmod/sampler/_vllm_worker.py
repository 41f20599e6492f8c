"""A plug-in for vLLM workers, which receives the policy's weights through vLLM's weight-transfer interface.

vLLM loads it in every process of an engine, through the entry point ``rlmod`` of the group ``vllm.general_plugins``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory  # pyright: ignore[reportMissingImports]
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (  # pyright: ignore[reportMissingImports]
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info  # pyright: ignore[reportMissingImports]

from rlmod.sampler._weights import fetch_weights

BACKEND = "rlmod"
TIMEOUT = 60.0
"""Seconds without a byte, after which a transfer of weights fails."""


@dataclass
class WeightSource(WeightTransferInitInfo):
    """The trainer's address and the secret of the transfer. Weights are fetched from nowhere else."""

    host: str
    port: int
    secret: str


@dataclass
class WeightUpdate(WeightTransferUpdateInfo):
    """The weights themselves, within one process; None: they are fetched from the source."""

    weights: Any = None


class WeightReceiver(WeightTransferEngine[WeightSource, WeightUpdate]):
    init_info_cls, update_info_cls = WeightSource, WeightUpdate
    source: WeightSource | None = None

    def init_transfer_engine(self, init_info: WeightSource) -> None:
        self.source = init_info

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: WeightUpdate) -> None:
        try:
            self._receive(update_info)
        except BaseException:
            self._restore()
            raise

    def _receive(self, update_info: WeightUpdate) -> None:
        if update_info.weights is not None:
            self.model.load_weights(update_info.weights)
            return
        if self.source is None:
            raise ValueError("the engine has not been told where to fetch weights")
        with fetch_weights(self.source.host, self.source.port, self.source.secret, timeout=TIMEOUT) as weights:
            self.model.load_weights(self._move_to_device(weights))

    def _restore(self) -> None:
        """Put back the tensors of the layers that a failed update has not completed, so that the next update finds all of them."""
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        finalize_layerwise_reload(self.model, self.model_config)

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
