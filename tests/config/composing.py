"""Composed configs for tests."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from rlmod.config import cli

ROOT = Path(__file__).parents[2]


def composed(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        return compose(name, overrides=list(overrides))
