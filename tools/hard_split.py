"""Does the guide help where the policy alone hardly ever earns a reward? ``python tools/hard_split.py``

The task: sums and differences of three to five two-digit numbers modulo 100. Two policies are trained for it, of the shipped
tiny ones' architecture:

    expert   worked solutions only: the guide
    start    the expert, trained on until it gives the bare answer 98 times out of 100, which it can only guess: it has forgotten
             when to think, not how
"""

import argparse
import copy
from pathlib import Path

import torch
from tiny_policies import character_tokenizer, save, tiny_model, train

from rlmod.data.arithmetic import Arithmetic

TASK = {"min_numbers": 3, "max_numbers": 5, "operations": "+-", "modulus": 100}


def policies(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    problems = Arithmetic(split="train", size=50_000, **TASK)
    model = tiny_model(tokenizer)
    train(model, tokenizer, problems, updates=2500, worked=1.0, wrong=0.0, seed=seed)
    save(model, tokenizer, folder / "expert")
    start = copy.deepcopy(model)
    train(start, tokenizer, problems, updates=300, worked=0.02, wrong=0.0, seed=seed + 1)
    save(start, tokenizer, folder / "start")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, default=Path("runs/hard_split"))
    options = arguments.parse_args()
    policies(options.folder, seed=0)
