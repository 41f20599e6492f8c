"""rlmod: post-training of language models with reinforcement learning, composed from swappable parts."""

__version__ = "0.1.0"
