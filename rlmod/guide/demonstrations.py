"""A guide that replays recorded completions, one or several per prompt.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from rlmod import jsonl
from rlmod.guide._fields import check_completions, parse_prompt, prompt_key, shorten
from rlmod.model.policy import turn_end_ids
from rlmod.types import Problem, Prompts, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Demonstration(NamedTuple):
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """``completions_per_prompt`` of a prompt's recorded completions, drawn without replacement

    Each line of the file is a JSON object with ``prompt`` (the same as in the problems) and ``completion`` (text). Optional are
    ``completion_ids`` (tokens with EOS; by default the text is tokenized and an EOS added), ``logprobs`` (nats, one per token, of the
    policy that wrote the completion) and ``truncated`` (by default True if the tokens lack an EOS). ``rlmod-eval ...
    record_tokens=true`` writes such a file.

    Source: [R] MIX, arXiv:2507.12931, with LUFFY's demonstrations, arXiv:2504.14945.
    Differs: [D] without recorded log-probabilities ``ratio`` must be ``one``; a prompt without enough completions is an error.
    Degenerate: if exactly as many are recorded as requested, all are used, in the file's order, for every seed.
    """

    path: str
    completions_per_prompt: int = 2
    ratio: Literal["guide", "one"] = "guide"
    max_tokens: int | None = None
    """Longer completions are cut to this length and count as truncated; null: no limit."""

    def __post_init__(self) -> None:
        check_completions(self.completions_per_prompt)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"guide.max_tokens must be null or at least 1, got {self.max_tokens}")
        if not Path(self.path).is_file():
            raise ValueError(f"guide.path={self.path}: there is no such file; relative paths start at {Path.cwd()}")

    @cached_property
    def recorded(self) -> dict[str, list[Demonstration]]:
        """The demonstrations by prompt; filled by ``prepare``."""
        return {}

    def prepare(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None:
        """Read the file. Raise ValueError with the line at fault, or the problem that lacks demonstrations."""
        known = {_digest(prompt_key(problem)) for problem in problems}  # not the texts: there may be a million
        for where, record in jsonl.read_objects(Path(self.path)):
            prompt = parse_prompt(record, where)
            if _digest(prompt) not in known:
                raise ValueError(
                    f"{where}: no problem of data.train has this prompt, or it was dropped (see the log): {shorten(prompt)}"
                )
            self.recorded.setdefault(prompt, []).append(_parse_demonstration(record, where, self, tokenizer))
        wanted = max(self.completions_per_prompt, 1)
        for problem in problems:
            found = len(self.recorded.get(prompt_key(problem), ()))
            if found < wanted:
                lacking = sum(len(self.recorded.get(prompt_key(p), ())) < wanted for p in problems)
                raise ValueError(
                    f"guide.path={self.path}: {found} of the {wanted} demonstrations that the prompt of {problem.source} needs "
                    f"({shorten(prompt_key(problem))}); {lacking} of {len(problems)} problems lack demonstrations"
                )

    def __call__(self, prompts: Prompts, completions_per_prompt: int, seed: int) -> Rollouts:
        generator = torch.Generator().manual_seed(seed)
        chosen = [d for problem in prompts.problems for d in self._draw(problem, completions_per_prompt, generator)]
        device = prompts.ids.device
        group = torch.arange(len(prompts), device=device).repeat_interleave(completions_per_prompt)
        mask = _pad_rows([[True] * len(d.ids) for d in chosen], torch.bool).to(device)
        logprobs = _pad_rows([d.logprobs for d in chosen], torch.float32).to(device)
        return Rollouts(
            prompt_ids=prompts.ids[group],
            prompt_mask=prompts.mask[group],
            completion_ids=_pad_rows([d.ids for d in chosen], torch.long).to(device),
            mask=mask,
            group=group,
            logprobs=logprobs,
            sampler_logprobs=logprobs,
            truncated=torch.tensor([d.truncated for d in chosen], device=device),
        )

    def _draw(self, problem: Problem, number: int, generator: torch.Generator) -> list[Demonstration]:
        found = self.recorded[prompt_key(problem)]
        picked = sorted(torch.randperm(len(found), generator=generator)[:number].tolist())
        # The zero-reward batch may ask for more than there are: then they repeat.
        return [found[picked[i % len(picked)]] for i in range(number)]


def _pad_rows(values: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in values], batch_first=True)


def _digest(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _parse_demonstration(
    record: Mapping[str, Any], where: str, settings: Demonstrations, tokenizer: "PreTrainedTokenizerBase"
) -> Demonstration:
    ids = _parse_ids(record, where, tokenizer)
    logprobs = _parse_logprobs(record, where, len(ids), settings.ratio)
    cut = settings.max_tokens is not None and len(ids) > settings.max_tokens
    limit = settings.max_tokens if cut else None
    lacks_eos = ids[-1] not in turn_end_ids(tokenizer)
    truncated = cut or bool(record.get("truncated", lacks_eos))
    return Demonstration(tuple(ids[:limit]), tuple(logprobs[:limit]), truncated)


def _parse_ids(record: Mapping[str, Any], where: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the recorded tokens, or those of the text and an EOS."""
    text, ids = record.get("completion"), record.get("completion_ids")
    eos, end = cast(int, tokenizer.eos_token_id), cast(str, tokenizer.eos_token)
    if not isinstance(text, str | None) or (text is None and ids is None):
        raise ValueError(f"{where}: completion must be text, got {text!r}")
    if ids is None:
        assert text is not None
        return [*cast(list[int], tokenizer.encode(text.removesuffix(end), add_special_tokens=False)), eos]
    vocabulary = len(tokenizer)
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        raise ValueError(f"{where}: completion_ids must be token ids from 0 to {vocabulary - 1}, at least one")
    if eos in ids[:-1]:
        raise ValueError(
            f"{where}: completion_ids has an EOS ({eos}) at index {ids.index(eos)} and tokens after it: a completion must end there"
        )
    # A recorded text may or may not hold special tokens such as <think>.
    decoded, whole = (cast(str, tokenizer.decode(ids, skip_special_tokens=skip)) for skip in (True, False))
    endings = [cast(str, tokenizer.decode([token])) for token in turn_end_ids(tokenizer)]
    visible = next((whole.removesuffix(ending) for ending in endings if whole.endswith(ending)), whole)
    if text is not None and text.removesuffix(end).split() not in (decoded.split(), visible.split()):
        raise ValueError(
            f"{where}: completion and completion_ids differ: {shorten(text)}, but the tokens decode to {shorten(decoded)}"
        )
    return ids


def _parse_logprobs(record: Mapping[str, Any], where: str, tokens: int, ratio: Literal["guide", "one"]) -> list[float]:
    logprobs = record.get("logprobs")
    if logprobs is None:
        if ratio == "guide":
            raise ValueError(
                f"{where}: no logprobs, which guide.ratio=guide divides by; record them, or set guide.ratio=one"
            )
    elif not isinstance(logprobs, list) or len(logprobs) != tokens:
        found = len(logprobs) if isinstance(logprobs, list) else repr(logprobs)
        raise ValueError(f"{where}: logprobs must be one number per token: {tokens} tokens (EOS included), got {found}")
    elif invalid := [
        p for p in logprobs if not (isinstance(p, int | float) and -torch.finfo(torch.float32).max <= p <= 0)
    ]:
        raise ValueError(f"{where}: a log-probability is a finite number of at most 0, got {invalid[0]!r}")
    return [0.0] * tokens if ratio == "one" else cast(list[float], logprobs)
