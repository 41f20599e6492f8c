"""``rlmod-export RUN_OR_CHECKPOINT OUTPUT``: the trained policy as a folder in Hugging Face format.

Every checkpoint has such a folder, ``policy/``, whatever the strategy that wrote it. The command finds the newest checkpoint that is whole,
copies that folder, and on the way merges an adapter into its base (``--merge``) or changes the precision of the weights (``--dtype``).
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from rlmod.training import checkpoint as checkpoints

DTYPES = ("float32", "bfloat16", "float16")


def export(place: Path, output: Path, *, merge: bool = False, dtype: str | None = None) -> Path:
    """Writes ``output``, whole or not at all, and returns the checkpoint that it is of. ValueError for what cannot be exported."""
    checkpoint = _checkpoint(place)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already, and nothing is written over: give another folder")
    adapted = (checkpoint / "policy" / "adapter_config.json").is_file()
    if merge and not adapted:
        raise ValueError(f"--merge: {checkpoint} holds a whole policy, without an adapter to merge; leave it out")
    if dtype is not None and adapted and not merge:
        raise ValueError(
            "--dtype is of whole weights, and this policy is an adapter: give --merge too, or leave it out"
        )
    partial = output.with_name(f".partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if merge or dtype is not None:
            _convert(checkpoint, partial, dtype)
        else:
            shutil.copytree(checkpoint / "policy", partial)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def _checkpoint(place: Path) -> Path:
    if not place.is_dir():
        raise ValueError(f"{place}: there is no such folder; relative paths start at {Path.cwd()}")
    found = checkpoints.newest_whole(place)
    if found is not None:
        return found
    if (place.parent / checkpoints.MANIFEST).is_file():
        raise ValueError(f"{place} is a part of a checkpoint: give the checkpoint, {place.parent}")
    raise ValueError(
        f"{place}: no whole checkpoint there; give a run's folder (with checkpoints/step-* in it), or one of those"
    )


def _convert(checkpoint: Path, folder: Path, dtype: str | None) -> None:
    """An adapter is merged in float32 and then rounded once, by default to the precision of training."""
    import torch

    from rlmod.config import cli
    from rlmod.model.policy import HFPolicy, save_policy

    cli.quiet()
    specification = HFPolicy(path=str(checkpoint / "policy"), dtype="float32")
    tokenizer = specification.tokenizer()
    policy: Any = specification.model(tokenizer)
    if specification.is_adapter:
        policy = policy.merge_and_unload()
    dtype = dtype or cast(str, OmegaConf.load(checkpoint / "config.yaml").policy.dtype)
    save_policy(policy.to(getattr(torch, dtype)), tokenizer, folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rlmod-export",
        description="Writes the trained policy as a folder that AutoModelForCausalLM and policy.path=FOLDER load.",
    )
    parser.add_argument(
        "place", type=Path, metavar="RUN_OR_CHECKPOINT", help="of a run, the newest whole checkpoint is taken"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder to write; nothing is written over")
    parser.add_argument("--merge", action="store_true", help="of adapter=lora: a whole model instead of the adapter")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; by default as they were trained")
    given = parser.parse_args(argv)
    try:
        checkpoint = export(given.place, given.output, merge=given.merge, dtype=given.dtype)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{given.output} could not be written: {error}")
    print(f"{given.output}: the policy of {checkpoint}; to resume with it: policy=hf policy.path={given.output}")


if __name__ == "__main__":
    main()
