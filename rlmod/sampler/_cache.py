"""A key-value cache with preallocated buffers. It is not in hf.py because its imports take seconds."""

from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlmod.sampler._sampling import CACHE_GROWTH


class PreallocatedCacheLayer(DynamicLayer):
    """A cache layer that copies its contents every ``CACHE_GROWTH`` tokens. The base class copies them for every token.

    ``keys`` and ``values`` are the cached tensors, as in the base class: views of the first positions of two buffers. No gradients are
    kept. Under autocast the values stay in 16 bits; the base class widens them to the 32 bits of the keys.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.buffers: dict[str, Tensor] = {}

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] (the base allows any further arguments)
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        cached = self.get_seq_length()
        if not cached:
            self.lazy_initialization(key_states, value_states)
        # One after the other, so that the old keys are freed before the values are copied.
        self.keys = self._append("keys", cast(Tensor, self.keys), cached, key_states)
        self.values = self._append("values", cast(Tensor, self.values), cached, value_states)
        return self.keys, self.values

    def _append(self, name: str, old: Tensor, cached: int, new: Tensor) -> Tensor:
        length, buffer = cached + new.shape[-2], self.buffers.pop(name, None)
        # If the base class has replaced the tensor, the old contents are not in the buffer.
        if buffer is None or buffer.data_ptr() != old.data_ptr() or buffer.shape[-2] < length:
            buffer = new.new_empty(*new.shape[:-2], length + CACHE_GROWTH, new.shape[-1])
            if cached:
                buffer[..., :cached, :] = old
        buffer[..., cached:length, :] = new
        self.buffers[name] = buffer
        return buffer[..., :length, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers.clear()  # otherwise the memory of the removed rows would be held until the next token
        super().batch_select_indices(indices)


def preallocate(cache: DynamicCache) -> DynamicCache:
    """Replace the full-attention layers of an empty cache by preallocated ones, and return the cache."""
    cache.layers = [PreallocatedCacheLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
