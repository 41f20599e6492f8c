"""SmolLM2-135M-Instruct, which is not the project's to hand on: ``make real-policy`` fetches it, and without it the tests are skipped."""

import pytest

from rlmod.model import gguf
from rlmod.model.policy import HFPolicy


def is_installed() -> bool:
    try:
        gguf.packaged_folder("smollm2")
    except ValueError:
        return False
    return True


needs_real_policy = pytest.mark.skipif(
    not is_installed(), reason="needs the policy smollm2, which make real-policy fetches"
)


def smollm2() -> HFPolicy:
    return HFPolicy(path="smollm2")
