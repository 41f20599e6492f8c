"""rlmod: post-training of language models with reinforcement learning, built from swappable components.

    import rlmod
    rlmod.train(["experiment=quickstart", "seed=1"])       # what rlmod-train does; returns the run's result
    rlmod.evaluate(["policy=hf", "policy.path=FOLDER"])    # what rlmod-eval does; returns the summary
    rlmod.RLModule, rlmod.RLData                           # for your own lightning.Trainer

Names are loaded on first use: ``import rlmod`` imports neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlmod.commands.evaluate import evaluate_from_python as evaluate
    from rlmod.config.sizes import Batch, Guard, Validation
    from rlmod.model.policy import HFPolicy
    from rlmod.rollout.prompts import EncodedProblems, PromptEncoder
    from rlmod.train import train_from_python as train
    from rlmod.training.datamodule import RLData
    from rlmod.training.module import RLModule
    from rlmod.types import Problem, Prompts, Rollouts, Texts, build_rollouts

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "EncodedProblems",
    "Guard",
    "HFPolicy",
    "Problem",
    "PromptEncoder",
    "Prompts",
    "RLData",
    "RLModule",
    "Rollouts",
    "Texts",
    "Validation",
    "build_rollouts",
    "evaluate",
    "train",
]

_MODULES = {
    "Batch": "rlmod.config.sizes",
    "Guard": "rlmod.config.sizes",
    "Validation": "rlmod.config.sizes",
    "HFPolicy": "rlmod.model.policy",
    "EncodedProblems": "rlmod.rollout.prompts",
    "PromptEncoder": "rlmod.rollout.prompts",
    "RLData": "rlmod.training.datamodule",
    "RLModule": "rlmod.training.module",
    "Problem": "rlmod.types",
    "Prompts": "rlmod.types",
    "Rollouts": "rlmod.types",
    "Texts": "rlmod.types",
    "build_rollouts": "rlmod.types",
}


def __getattr__(name: str) -> Any:
    if name == "train":  # the module itself is callable
        return import_module("rlmod.train")
    if name == "evaluate":
        return import_module("rlmod.commands.evaluate").evaluate_from_python
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'rlmod' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
