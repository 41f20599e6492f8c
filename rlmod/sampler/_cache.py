"""A key-value cache with room ahead. Apart from hf.py, since its imports take seconds."""

from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlmod.sampler._sampling import CACHE_GROWTH


class PreallocatedCacheLayer(DynamicLayer):
    """A cache layer that copies its contents every ``CACHE_GROWTH`` tokens; its base does so for every token.

    ``keys`` and ``values`` are what is held, as with the base: the first places of two buffers. Without gradients. Under autocast values
    stay in 16 bits, which the base widens to the keys' 32.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.buffers: dict[str, Tensor] = {}

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] (the base leaves open what else it is given)
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        held = self.get_seq_length()
        if not held:
            self.lazy_initialization(key_states, value_states)
        # One after the other: the old keys are gone before the values are copied.
        self.keys = self._appended("keys", cast(Tensor, self.keys), held, key_states)
        self.values = self._appended("values", cast(Tensor, self.values), held, value_states)
        return self.keys, self.values

    def _appended(self, name: str, kept: Tensor, held: int, new: Tensor) -> Tensor:
        length, buffer = held + new.shape[-2], self.buffers.pop(name, None)
        # What is kept lies elsewhere where the base has put another tensor in the buffer's stead.
        if buffer is None or buffer.data_ptr() != kept.data_ptr() or buffer.shape[-2] < length:
            buffer = new.new_empty(*new.shape[:-2], length + CACHE_GROWTH, new.shape[-1])
            if held:
                buffer[..., :held, :] = kept
        buffer[..., held:length, :] = new
        self.buffers[name] = buffer
        return buffer[..., :length, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers.clear()  # or what is left behind would stay until the next token
        super().batch_select_indices(indices)


def preallocated(cache: DynamicCache) -> DynamicCache:
    """The cache with its layers of full attention replaced, before anything is in it."""
    cache.layers = [PreallocatedCacheLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
