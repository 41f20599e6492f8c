"""The key-value cache that is allocated ahead holds what transformers' holds."""

import pytest
import torch
from transformers import DynamicCache, Qwen2Config

from rlmod.sampler import _cache
from rlmod.sampler._cache import PreallocatedCacheLayer, preallocate


def config(**settings) -> Qwen2Config:
    return Qwen2Config(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, num_key_value_heads=2, **settings)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("inference", [False, True])
def test_it_holds_the_same_whatever_comes_and_goes(inference, dtypes, monkeypatch):
    monkeypatch.setattr(_cache, "CACHE_GROWTH", 3)
    draw = torch.Generator().manual_seed(0)
    mine, plain = preallocate(DynamicCache(config=config())), DynamicCache(config=config())
    with torch.inference_mode(inference), torch.no_grad():
        for kept, tokens in ((range(5), (4, 1, 1, 1, 1, 1)), ((0, 3, 4), (2, 1, 1)), ((2,), (1,) * 9), ((), ())):
            for cache in (mine, plain):
                cache.batch_select_indices(torch.tensor(kept, dtype=torch.long))
            for n in tokens:
                new = [torch.randn(len(kept), 2, n, 4, generator=draw).to(dtype) for dtype in dtypes]
                for layer in range(2):
                    pairs = zip(mine.update(*new, layer), plain.update(*new, layer), dtypes, strict=True)
                    for held, expected, dtype in pairs:
                        assert held.dtype == dtype
                        assert torch.equal(held.float(), expected.float())
            assert mine.get_seq_length() == plain.get_seq_length()


def test_it_copies_what_it_holds_only_when_there_is_no_room(monkeypatch):
    monkeypatch.setattr(_cache, "CACHE_GROWTH", 10)
    cache, places = preallocate(DynamicCache(config=config())), []
    for _ in range(33):
        keys, _ = cache.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
        places.append(keys.data_ptr())
    assert [n for n in range(1, 33) if places[n] != places[n - 1]] == [11, 22]


def test_a_layer_that_forgets_stays_as_it_is():
    sliding = config(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    first, second = preallocate(DynamicCache(config=sliding)).layers
    assert isinstance(first, PreallocatedCacheLayer)
    assert not isinstance(second, PreallocatedCacheLayer)
