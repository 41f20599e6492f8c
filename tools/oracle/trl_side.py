"""TRL's answers, in an environment of its own: ``python trl_side.py inputs.pt outputs.pt policy-folder``.

The loss is GRPOTrainer's own method, called on our log-probabilities instead of a model's. The advantages come from a whole step of a
GRPOTrainer on a tiny policy.
"""

import sys
import tempfile
from collections import defaultdict
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

LOSSES: dict[str, dict[str, Any]] = {
    "clipped, token mean": {"loss_type": "dapo"},
    "clipped, rollout mean": {"loss_type": "grpo"},
    "clipped, constant": {"loss_type": "dr_grpo"},
    "sequence ratio, geometric": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo, upper bound": {"loss_type": "cispo", "epsilon_high": 1.28},  # TRL's is the bound itself
    "sapo": {"loss_type": "sapo"},
    "gmpo": {"trainer": GMPOTrainer, "epsilon_low": 0.4, "epsilon_high": 0.4},
    "kl penalty, k3": {"loss_type": "grpo", "beta": 0.1},
    "kl penalty, k3, times the ratio": {"loss_type": "grpo", "beta": 0.1, "bias_correction": True},
    "forking tokens": {"loss_type": "dapo", "top_entropy_quantile": 0.2},
    "truncated importance": {"loss_type": "dapo", "use_vllm": True, "vllm_importance_sampling_correction": True},
    "entropy bonus": {"loss_type": "dapo", "_entropy_bonus_enabled": True, "entropy_coef": 0.05},
    "a fully masked row, rollout mean": {"loss_type": "grpo", "masked_row": True},
}


def loss_of(case: dict[str, torch.Tensor], settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    settings = dict(settings)
    method = settings.pop("trainer", GRPOTrainer)._compute_loss
    mask = case["mask"].clone()
    if settings.pop("masked_row", False):
        mask[0] = False
    logprobs = case["logprobs"].clone().requires_grad_()
    entropy = case["entropy"].clone().requires_grad_()
    trainer = SimpleNamespace(
        **{
            "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
            "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28,
            "use_vllm": False, "vllm_importance_sampling_correction": False, "_entropy_bonus_enabled": False,
            "use_adaptive_entropy": False, "max_completion_length": mask.shape[1], "current_gradient_accumulation_steps": 1,
            "args": SimpleNamespace(
                use_bias_correction_kl=settings.pop("bias_correction", False), delta=None, steps_per_generation=1,
                sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            ),
            "model": SimpleNamespace(training=True), "_metrics": {"train": defaultdict(list)},
            "accelerator": SimpleNamespace(
                num_processes=1, sync_gradients=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
                reduce=lambda x, reduction: x, pad_across_processes=lambda x, **_: x,
            ),
            "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, entropy, None),
            **settings,
        }
    )  # fmt: skip
    trainer.get_high_entropy_mask = MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    ids = torch.zeros_like(mask, dtype=torch.long)
    weights = (case["old"] - case["sampler"]).exp().clamp(max=2.0)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask.double(),
        "advantages": case["advantages"], "old_per_token_logps": case["old"], "ref_per_token_logps": case["reference"],
        "importance_sampling_ratio": weights, "num_items_in_batch": mask.sum().double(),
    }  # fmt: skip
    loss = method(trainer, None, inputs)
    loss.backward()
    gradient = torch.zeros_like(logprobs) if logprobs.grad is None else logprobs.grad
    bonus = {} if entropy.grad is None else {"entropy gradient": entropy.grad}
    return {"value": loss.detach(), "gradient": gradient, **bonus}


def whole_step(policy: str) -> dict[str, torch.Tensor]:
    """The rewards and advantages of one step of a GRPOTrainer."""
    seen: dict[str, torch.Tensor] = {}

    class Watched(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            made = super()._generate_and_score_completions(inputs)
            seen["advantages"] = made["advantages"].clone()
            return made

    def reward(completions: list[str], **_: Any) -> list[float]:
        values = [0.35 * (len(c) % 3) + 0.1 * c.count("#") for c in completions]
        seen["rewards"] = torch.tensor(values)
        return values

    prompts = ["3+5*2:", "1+1-7+4:", "9*9*9-3:", "2-8+5*6+1:"]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=1, per_device_train_batch_size=16, num_generations=4, max_completion_length=24,
            use_cpu=True, bf16=False, report_to=[], seed=0, disable_tqdm=True, logging_strategy="no", save_strategy="no",
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": prompts * 4})
        Watched(model=policy, args=config, reward_funcs=[reward], train_dataset=data).train()
    return seen


def main() -> None:
    source, target, policy = sys.argv[1:]
    cases = torch.load(source)
    answers = [{name: loss_of(case, settings) for name, settings in LOSSES.items()} for case in cases]
    torch.save({"cases": answers, "step": whole_step(policy)}, target)


if __name__ == "__main__":
    main()
