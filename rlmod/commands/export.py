"""Export the trained policy in Hugging Face format: ``rlmod-export RUN_OR_CHECKPOINT OUTPUT``.

Every checkpoint has such a folder, ``policy/``, whatever strategy wrote it. The command finds the newest complete checkpoint and copies its
folder. It can also merge an adapter into its base (``--merge``) or change the precision of the weights (``--dtype``).
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlmod.config.environment import read_config, select
from rlmod.training import checkpoint as checkpoints

DTYPES = ("float32", "bfloat16", "float16")


def export(place: Path, output: Path, *, merge: bool = False, dtype: str | None = None) -> Path:
    """Write ``output`` completely or not at all, and return the exported checkpoint. Raise ValueError if it cannot be exported."""
    checkpoint = _find_checkpoint(place)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not overwritten: give another folder")
    adapted = (checkpoint / "policy" / "adapter_config.json").is_file()
    if merge and not adapted:
        raise ValueError(f"--merge: {checkpoint} holds full weights and no adapter to merge; omit --merge")
    if dtype is not None and adapted and not merge:
        raise ValueError(
            f"--dtype={dtype} applies to full weights, and this policy is an adapter: add --merge, or omit --dtype"
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


def _find_checkpoint(place: Path) -> Path:
    """Return the newest complete checkpoint of a run, or the checkpoint itself. Raise ValueError if there is none."""
    if not place.is_dir():
        raise ValueError(f"{place}: there is no such folder; relative paths start at {Path.cwd()}")
    found = checkpoints.find_newest_checkpoint(place)
    if found is not None:
        return found
    if (place.parent / checkpoints.MANIFEST).is_file():
        raise ValueError(f"{place} is a folder inside a checkpoint: give the checkpoint, {place.parent}")
    raise ValueError(
        f"{place}: no complete checkpoint found; give the folder of a run (it has checkpoints/step-*) or one checkpoint"
    )


def _convert(checkpoint: Path, folder: Path, dtype: str | None) -> None:
    """Save the policy with its adapter merged and its weights in ``dtype``.

    The adapter is merged in float32, and the result is rounded once, by default to the precision of training.
    """
    import torch

    from rlmod.config import cli
    from rlmod.model.policy import HFPolicy
    from rlmod.model.saving import save_policy

    config = checkpoint / "config.yaml"
    dtype = dtype or select(read_config(config), "policy.dtype")
    if dtype not in DTYPES:
        raise ValueError(f"{config}: policy.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}; or give --dtype")
    cli.silence_libraries()
    specification = HFPolicy(path=str(checkpoint / "policy"), dtype="float32")
    tokenizer = specification.tokenizer()
    policy: Any = specification.model(tokenizer)
    if specification.is_adapter:
        policy = policy.merge_and_unload()
    save_policy(policy.to(getattr(torch, dtype)), tokenizer, folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rlmod-export",
        description="Write the trained policy as a folder that AutoModelForCausalLM and policy.path=FOLDER load.",
    )
    parser.add_argument(
        "place",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run (its newest complete checkpoint is exported) or a checkpoint",
    )
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="folder to write; existing files are not overwritten"
    )
    parser.add_argument(
        "--merge", action="store_true", help="with adapter=lora: export the merged model instead of the adapter"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights; default: as trained")
    args = parser.parse_args(argv)
    try:
        checkpoint = export(args.place, args.output, merge=args.merge, dtype=args.dtype)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{args.output} could not be written: {error}")
    print(f"{args.output}: the policy of {checkpoint}; to train or evaluate it: policy=hf policy.path={args.output}")


if __name__ == "__main__":
    main()
