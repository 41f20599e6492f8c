"""The reference is a stronger model, which scores the tokens that the policy samples."""

from dataclasses import dataclass

from rlmod.reference.frozen import Frozen


@dataclass(frozen=True, kw_only=True)
class Teacher(Frozen):
    """pi_ref = pi_T, a stronger model of the policy's tokenizer, for correction=[distillation] or regularizer=[kl_k2]

    Source: "On-Policy Distillation", Thinking Machines (2025).
    Degenerate: a teacher that equals the policy gives the policy's log-probabilities.
    Reads: prompt_ids, prompt_mask, completion_ids.
    """
