"""The checker of types and shapes at run time under pytest (see addopts in pyproject.toml)."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""A whole number passes for a float, as YAML's 1 does."""
