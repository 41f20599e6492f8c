"""Checks shared by all guides (expert policies whose completions are off-policy samples)."""


def check_completions(completions_per_prompt: int) -> None:
    if completions_per_prompt < 0:
        raise ValueError(
            f"guide.completions_per_prompt must be 0 (only the zero-reward batch uses the guide) or more, got {completions_per_prompt}"
        )
