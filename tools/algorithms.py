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


def component(stage: str, name: str, target: str, composed: dict[str, DictConfig]) -> Component:
    doc = inspect.getdoc(get_class(target)) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}): ", doc, flags=re.MULTILINE)
    sections = {title: " ".join(text.split()) for title, text in zip(parts[1::2], parts[2::2], strict=True)}
    used = [r for r, cfg in composed.items() if _uses(cfg, stage, target)]
    return Component(stage=stage, name=name, formula=parts[0].strip(), sections=sections, recipes=used)


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


def page() -> str:
    composed = recipes()
    made = components(composed)
    lines = [HEAD, "| recipe | what | components |", "|---|---|---|"]
    lines += [recipe_row(name, cfg, made) for name, cfg in composed.items()]
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
