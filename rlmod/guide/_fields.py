"""Checks that all guides share."""


def check_completions(completions_per_prompt: int) -> None:
    if completions_per_prompt < 0:
        raise ValueError(
            f"guide.completions_per_prompt must be 0 (for the zero-reward batch alone) or more, got {completions_per_prompt}"
        )
