"""A key-value cache with room ahead. Apart from hf.py, since its imports take seconds."""

from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlmod.sampler._sampling import ROOM


class RoomyLayer(DynamicLayer):
    """As its base, which copies all that it holds for every token that comes; this one copies it for every ``ROOM`` tokens.

    ``keys`` and ``values`` are what is held, as with the base: the first places of two buffers. Without gradients. Under autocast values
    stay in 16 bits, which the base widens to the keys' 32.
    """

    buffers: tuple[Tensor, Tensor] | None = None

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] (the base leaves open what else it is given)
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        held = self.get_seq_length()
        if not held:
            self.lazy_initialization(key_states, value_states)
        length = held + key_states.shape[-2]
        if not self._has_room(length):
            self.buffers = self._larger(self.keys, key_states, held), self._larger(self.values, value_states, held)
        assert self.buffers is not None
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., held:length, :] = new
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = None  # or what was left behind would stay until the next token

    def _has_room(self, length: int) -> bool:
        if self.buffers is None or self.buffers[0].data_ptr() != cast(Tensor, self.keys).data_ptr():
            return False  # the base has put other tensors in the buffers' stead
        return self.buffers[0].shape[-2] >= length

    @staticmethod
    def _larger(held: Any, new: Tensor, length: int) -> Tensor:
        buffer = new.new_empty(*new.shape[:-2], length + new.shape[-2] + ROOM, new.shape[-1])
        if length:
            buffer[..., :length, :] = held
        return buffer


def roomy(cache: DynamicCache) -> DynamicCache:
    """The cache with its layers of full attention replaced, before anything is in it."""
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
