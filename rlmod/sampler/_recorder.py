"""Records log-probabilities and entropies while transformers' ``generate`` runs. It is not in hf.py because its imports take seconds."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from rlmod import ops
from rlmod.sampler._stop_strings import StopStrings


class LastLogits(LogitsProcessor):
    """Keeps the raw logits of a position: ``generate`` applies a caller's processors before temperature, top-k and top-p."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (the base names tensors of one dtype)
        self, input_ids: Int[Tensor, "R length"], scores: Float[Tensor, "R V"]
    ) -> Float[Tensor, "R V"]:
        self.logits = scores
        return scores


class Recorder(StoppingCriteria):
    """Records the log-probability of each sampled token and the entropy at its position; stops when a quarter of the rows have ended.

    ``start`` is the number of prompt tokens in a row, where its completion begins.
    """

    def __init__(
        self,
        last: LastLogits,
        temperature: float,
        eos: Int[Tensor, " eos"],
        stop_strings: StopStrings | None = None,
        start: int = 0,
    ) -> None:
        self.last, self.temperature, self.eos, self.stop_strings, self.start = (
            last,
            temperature,
            eos,
            stop_strings,
            start,
        )
        self.ended: Bool[Tensor, " R"] | None = None
        self.ends: list[Bool[Tensor, " R"]] = []
        """For each token, True if it ends the completion."""
        self.logprobs: list[Float[Tensor, " R"]] = []
        self.entropy: list[Float[Tensor, " R"]] = []

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (the base names tensors of one dtype)
        self, input_ids: Int[Tensor, "R length"], scores: object, **_: object
    ) -> Bool[Tensor, " R"]:
        chosen = input_ids[:, -1]
        logprobs, entropy = ops.sampled_logprobs_and_entropy(self.last.logits, chosen, self.temperature)
        self.logprobs.append(logprobs)
        self.entropy.append(entropy)
        ended = (chosen[:, None] == self.eos).any(-1)
        if self.stop_strings is not None:
            running = ~ended if self.ended is None else ~(ended | self.ended)
            ended = ended | self.stop_strings.completed(input_ids[:, self.start :], running)
        self.ends.append(ended)
        self.ended = ended if self.ended is None else self.ended | ended
        return torch.full_like(ended, bool(4 * self.ended.sum() >= len(ended)))
