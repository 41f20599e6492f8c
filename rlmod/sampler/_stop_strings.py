"""Stop strings for a sampler that sees tokens and no text."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""The text that a tokenizer returns for a character of which only some bytes are there."""


class StopStrings:
    """Finds the completions whose last token completes a stop string, as vLLM does: in the text of the completion without the prompt,
    special tokens included, once its last character is complete."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.candidates = _candidates(tokenizer, frozenset(text[-1] for text in self.stop))

    def completed(self, completions: Int[Tensor, "R length"], running: Bool[Tensor, " R"]) -> Bool[Tensor, " R"]:
        """Return True for the ``running`` rows whose last token completes a stop string."""
        last = completions[:, -1].cpu()
        known = last.clamp(max=len(self.candidates) - 1)
        rows = (self.candidates[known] & (last == known) & running.cpu()).nonzero()[:, 0].tolist()
        found = torch.zeros(len(completions), dtype=torch.bool)
        for row, text in zip(rows, _decode(self.tokenizer, completions[rows].tolist()), strict=True):
            found[row] = not text.endswith(UNFINISHED) and any(stop in text for stop in self.stop)
        return found.to(completions.device)


@lru_cache(maxsize=8)
def _candidates(tokenizer: "PreTrainedTokenizerBase", endings: frozenset[str]) -> Bool[Tensor, " V"]:
    """Return True for the tokens that may hold one of these characters. Only after these is the text of a completion looked at."""
    # Some tokenizers drop the space at the beginning of a text, so each token is decoded after another one.
    before = cast(list[int], tokenizer.encode("a", add_special_tokens=False))
    texts = _decode(tokenizer, [[*before, token] for token in range(len(tokenizer))])
    start = len(_decode(tokenizer, [before])[0])
    return torch.tensor([not endings.isdisjoint(text[start:]) or UNFINISHED in text for text in texts])


def _decode(tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]]) -> list[str]:
    if not rows:
        return []
    decoded = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return cast(list[str], decoded)
