"""The index of the algorithms is what the docstrings and configs say now."""

import importlib.util
import re
from pathlib import Path

from tests.config.test_conf import is_variant

ROOT = Path(__file__).parents[2]


def index():
    specification = importlib.util.spec_from_file_location("algorithms", ROOT / "tools" / "algorithms.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_index_is_not_stale():
    assert index().PAGE.read_text() == index().page(), "docs/algorithms.md is stale: make docs"


def test_every_recipe_and_every_component_is_in_it():
    text = (ROOT / "docs" / "algorithms.md").read_text()
    for file in (ROOT / "conf" / "experiment").glob("*.yaml"):
        assert f"| `{file.stem}` |" in text
    for stage in index().STAGES:
        for file in (ROOT / "conf" / stage).glob("*.yaml"):
            if file.stem == "none":
                continue
            if is_variant(stage, file.stem):
                assert re.search(rf"^- Variants: .*`{file.stem}` \(", text, re.MULTILINE), (stage, file.stem)
            else:
                assert re.search(rf"^### `{stage}=\[?{file.stem}\]?`", text, re.MULTILINE), (stage, file.stem)


def test_the_methods_of_table_1_differ_only_in_what_the_papers_change():
    table = index().table_of_differences()
    changed = {line.split("`")[1].split(".")[0] for line in table if line.startswith("| `")}
    assert changed == {"reward", "filter", "shaper", "correction", "aggregation", "loss"}
