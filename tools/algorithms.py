"""Writes docs/algorithms.md, the index of the algorithms, from the docstrings and the configs: ``make docs``.

tests/tools/test_algorithms.py fails when the page is stale.
"""

import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from rlmod.config import cli

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "algorithms.md"
STAGES = ["guide", "reward", "filter", "reference", "shaper", "correction", "aggregation", "loss", "regularizer"]
SECTIONS = ("Source", "Differs", "Degenerate", "Reads")
NODES = {"zero_reward": "rlmod.rollout.zero_reward.ZeroReward"}


@dataclass(frozen=True, kw_only=True)
class Component:
    stage: str
    name: str
    formula: str
    sections: dict[str, str]
    recipes: list[str]
    variants: list[str]
    """Options that are this one with other numbers."""

    @property
    def marks(self) -> str:
        found = sorted(set(re.findall(r"\[[DR]\]", " ".join(self.sections.values()))))
        return " ".join(["[S]", *found] if "[R]" not in found else found)


def recipes() -> dict[str, DictConfig]:
    names = sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))
    with initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        return {name: compose("train", overrides=[f"experiment={name}"]) for name in names}


def targets(node: object) -> set[str]:
    if not isinstance(node, dict):
        return set()
    inner = set().union(*(targets(value) for value in node.values())) if node else set()
    return inner | ({str(node["_target_"])} if node.get("_target_") else set())


def variants(stage: str, name: str) -> list[str]:
    """Return the options of the stage that begin from this one, directly or over another variant, with the numbers that they change."""
    found = []
    for file in sorted((ROOT / "conf" / stage).glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if "_target_:" not in text and re.search(rf"^  - {name}(@_here_)?$", text, re.MULTILINE):
            numbers = text.partition("  - _self_\n")[2].strip().replace("\n", ", ")
            found += [f"`{file.stem}` ({numbers})", *(f"{each} on top" for each in variants(stage, file.stem))]
    return found


def component(stage: str, name: str, target: str, composed: dict[str, DictConfig]) -> Component:
    doc = inspect.getdoc(get_class(target)) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}): ", doc, flags=re.MULTILINE)
    sections = {title: " ".join(text.split()) for title, text in zip(parts[1::2], parts[2::2], strict=True)}
    used = [r for r, cfg in composed.items() if _uses(cfg, stage, target)]
    return Component(
        stage=stage,
        name=name,
        formula=parts[0].strip(),
        sections=sections,
        recipes=used,
        variants=variants(stage, name),
    )


def _uses(cfg: DictConfig, stage: str, target: str) -> bool:
    node = OmegaConf.to_container(cfg[stage], resolve=False) if cfg.get(stage) is not None else {}
    if stage == "zero_reward":
        return cfg.zero_reward.weight > 0
    return target in targets(node)


def components(composed: dict[str, DictConfig]) -> list[Component]:
    found = []
    for stage in STAGES:
        for file in sorted((ROOT / "conf" / stage).glob("*.yaml")):
            target = re.search(r"^_target_: (\S+)", file.read_text(), re.MULTILINE)
            if target:
                found.append(component(stage, file.stem, target[1], composed))
        if stage == "reward":
            found += [component(name, name, target, composed) for name, target in NODES.items()]
    return found


def recipe_row(name: str, cfg: DictConfig, made: list[Component]) -> str:
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    title = re.sub(
        r"\s+", " ", text.split("\n#\n")[0].replace("# @package _global_", "").replace("\n#", " ").strip("# \n")
    )
    parts = [f"`{c.name}`" for c in made if name in c.recipes and c.stage != "reward" and c.name != "keep_all"]
    return f"| `{name}` | {title} | {', '.join(parts)} |"


TABLE_1 = ("grpo", "dapo", "dapo_forking", "gtpo", "grpo_s")


def flat(node: object, key: str = "") -> dict[str, object]:
    """Return the values of a config by dotted key."""
    if not isinstance(node, dict) or not node:
        return {key: node}
    return {k: v for name, value in node.items() for k, v in flat(value, f"{key}.{name}".strip(".")).items()}


def table_of_differences() -> list[str]:
    """Return the table of the keys in which the methods of GTPO's Table 1 differ at the paper's size."""
    with initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        composed = [compose("train", overrides=[f"experiment={name}", "size=paper_7b"]) for name in TABLE_1]
    configs = [flat(OmegaConf.to_container(cfg)) for cfg in composed]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = []
    for key in keys:
        values = [str(config.get(key, "")) for config in configs]
        if key.endswith("_target_"):
            values = [value.rpartition(".")[2] for value in values]
        if len(set(values)) > 1 and key != "name":
            rows.append(f"| `{key}` | " + " | ".join(f"`{v}`" if v else "" for v in values) + " |")
    return [
        "## The methods of GTPO's Table 1",
        "",
        "All keys in which `rlmod-train --cfg job experiment=RECIPE size=paper_7b` differs between them, beside `name`. An empty cell: the",
        "component has no such key.",
        "",
        "| key | " + " | ".join(f"`{name}`" for name in TABLE_1) + " |",
        "|---" * (len(TABLE_1) + 1) + "|",
        *rows,
    ]


def page() -> str:
    composed = recipes()
    made = components(composed)
    lines = [HEAD, "| recipe | what | components |", "|---|---|---|"]
    lines += [recipe_row(name, cfg, made) for name, cfg in composed.items()]
    lines += ["", *table_of_differences()]
    stage = None
    for part in made:
        if part.stage != stage:
            stage = part.stage
            lines += ["", f"## {stage}"]
        key = f"[{part.name}]" if part.stage in ("correction", "regularizer") else part.name
        title = part.stage if part.stage in NODES else f"{part.stage}={key}"
        lines += ["", f"### `{title}` {part.marks}", ""]
        equation, _, rest = part.formula.partition("\n\n")
        lines += [textwrap.indent(equation, "    "), "", *([rest, ""] if rest else [])]
        lines += [f"- {name}: {text}" for name, text in part.sections.items()]
        if part.variants:
            lines.append("- Variants: " + "; ".join(part.variants))
        if part.recipes:
            lines.append("- Recipes: " + ", ".join(f"`{name}`" for name in part.recipes))
    return "\n".join(lines) + "\n"


HEAD = """# The algorithms

`make docs` writes this page from the docstrings and configs. Marks: **[S]** stated by the source; **[D]** our decision, because the source
does not state it; **[R]** our reconstruction of a paper whose full text we could not read. "Differs" lists differences from the paper, TRL
and verl. [oracle.md](oracle.md) has the measured agreement with TRL and verl. [recipes.md](recipes.md) has results of each recipe on the
embedded task.
"""

if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
