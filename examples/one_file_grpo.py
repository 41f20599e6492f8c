"""GRPO in one file: the loop written out, without Lightning and without Hydra.

    python examples/one_file_grpo.py --iterations 20

Read this first. One iteration is

    1. sample G completions for each of a few prompts with the current policy (pi_old)
    2. reward every completion, and standardize the rewards within each prompt's group: the advantages
    3. compute the policy's log-probabilities of the same tokens, and take a gradient step on the clipped surrogate

The framework does the same with every step swappable, on many GPUs, in micro-batches, and with checkpoints.
tests/test_examples.py trains both and finds the same weights.
"""

import argparse
from collections.abc import Callable

import torch
from numpy.random import SeedSequence
from torch import Tensor

from rlmod import ops
from rlmod.data.arithmetic import Arithmetic
from rlmod.model.logprobs import logprobs_and_entropy
from rlmod.model.policy import HFPolicy, completion_texts
from rlmod.rollout.prompts import EncodedProblems, PromptEncoder
from rlmod.sampler.hf import HF
from rlmod.types import Prompts, Rollouts

# 1. Data ---------------------------------------------------------------------------------------------------------------


def prompts_of_iteration(problems: EncodedProblems, iteration: int, number: int, seed: int) -> Prompts:
    """Return the prompts of one iteration. Each pass over the problems has a new random order."""
    positions = range(iteration * number, (iteration + 1) * number)
    size = len(problems)
    chosen = []
    for position in positions:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position // size)
        chosen.append(int(torch.randperm(size, generator=generator)[position % size]))
    return problems.batch(chosen)


# 2. Reward -------------------------------------------------------------------------------------------------------------


def final_digit(completions: list[str], answers: list[str]) -> list[float]:
    """Return 1 for each completion whose last character is the answer, else 0."""
    return [float(c.strip()[-1:] == a) for c, a in zip(completions, answers, strict=True)]


# 3. Advantages ---------------------------------------------------------------------------------------------------------


def group_standardized(rewards: Tensor, rollouts: Rollouts, eps: float = 1e-6) -> Tensor:
    """A_{i,t} = (r_i - mean(r)) / (std(r) + eps) over the completions of the same prompt; 0 where the mask is False.

    rewards [R], result [R T]. A group whose rewards are all equal has no signal: its advantages are exactly 0.
    """
    index, groups = ops.group_index(rollouts.group)
    counted = rollouts.mask.any(1, keepdim=True)
    return ops.standardize(rewards[:, None], counted, index, groups, eps=eps) * rollouts.mask


# 4. Loss ---------------------------------------------------------------------------------------------------------------


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """-min(w A, clip(w, 1 - clip_low, 1 + clip_high) A), averaged over the tokens; w = pi_theta / pi_old per token. All [R T]."""
    ratio = ops.log_ratio(logprobs, old_logprobs, mask).exp()
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return (per_token * mask).sum() / mask.sum().clamp(min=1)


# 5. The loop -----------------------------------------------------------------------------------------------------------


def train(
    *,
    iterations: int,
    prompts_per_iteration: int = 16,
    completions_per_prompt: int = 8,
    max_new_tokens: int = 40,
    learning_rate: float = 2e-4,
    adam_eps: float = 1e-8,
    clip: float = 0.2,
    temperature: float = 1.0,
    seed: int = 0,
    reward: Callable[[list[str], list[str]], list[float]] = final_digit,
    problems: int = 512,
) -> torch.nn.Module:
    """Train the tiny policy on the embedded arithmetic and return it. Prints the mean reward of every iteration."""
    specification = HFPolicy(path="tiny")
    tokenizer = specification.tokenizer()
    policy = specification.model(tokenizer)
    data = PromptEncoder().encode(Arithmetic(split="train", size=problems)(), tokenizer)
    sampler = HF(completions_per_prompt=completions_per_prompt, max_new_tokens=max_new_tokens, temperature=temperature)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, eps=adam_eps)

    for iteration in range(iterations):
        prompts = prompts_of_iteration(data, iteration, prompts_per_iteration, seed)

        # Sample. pi_old is the policy without dropout. The seed depends only on the run's seed and the iteration, so a run can be resumed.
        policy.eval()
        place = SeedSequence([seed, 0, iteration, 0])
        rollouts = sampler(policy, prompts, int(place.generate_state(1)[0]))
        policy.train()

        # Reward, and standardize within each group of completions.
        completions = completion_texts(tokenizer, rollouts)
        answers = [str(prompts.problems[int(group)].answer) for group in rollouts.group]
        rewards = torch.tensor(reward(completions, answers))
        advantages = group_standardized(rewards, rollouts)

        # One gradient step. Completions with advantage 0 cannot change the policy, so the forward pass skips them. The loss is still an
        # average over the tokens of all completions.
        rows = (advantages != 0).any(1)
        if rows.any():
            train_on = rollouts.rows(rows).trimmed()
            length = train_on.mask.shape[1]
            logprobs, _ = logprobs_and_entropy(policy, train_on, temperature, entropy=False)
            old = train_on.logprobs
            assert old is not None  # sampler=hf records them while sampling
            mean_over_rows = clipped_surrogate(logprobs, old, advantages[rows, :length], train_on.mask, clip, clip)
            loss = mean_over_rows * (train_on.mask.sum() / rollouts.mask.sum())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        mixed = int(rows.view(prompts_per_iteration, -1).any(1).sum())
        print(
            f"iteration {iteration + 1:>3}  reward {float(rewards.mean()):.3f}  groups with signal {mixed}/{len(prompts)}"
        )
    return policy


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--iterations", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    train(iterations=args.iterations, seed=args.seed)
