"""A user's own components, outside the tree and as a package; and the wheel outside the checkout."""

import csv
import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest

from tests.command_line import SHORT

ROOT = Path(__file__).parents[2]
SHAPER = """
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class SignOnly:
    scale: float = 1.0

    def __call__(self, rollouts):
        return self.scale * (2.0 * (rollouts.rewards > 0.5) - 1.0)[:, None] * rollouts.mask
"""
REWARD = """
def shorter_is_better(texts, per_character=0.01):
    return [float(c.endswith("#" + a)) - per_character * len(c) for c, a in zip(texts.completions, texts.answers)]
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "sign_only.py").write_text(SHAPER)
    (tmp_path / "mylab" / "rewards.py").write_text(REWARD)
    (tmp_path / "conf" / "shaper").mkdir(parents=True)
    (tmp_path / "conf" / "shaper" / "sign_only.yaml").write_text("_target_: mylab.sign_only.SignOnly\nscale: 0.5\n")
    return tmp_path


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def test_a_shaper_by_one_file_and_one_yaml_and_a_reward_function_by_its_path(lab):
    train = str(Path(sys.executable).with_name("rlmod-train"))
    reward = [
        "reward._target_=mylab.rewards.shorter_is_better",
        "~reward.pattern",
        "~reward.correct",
        "~reward.incorrect",
    ]
    done = command(
        lab, train, "--config-dir", "conf", "shaper=sign_only", *reward, "+reward.per_character=0.001",
        *SHORT, "trainer.max_epochs=2", "output=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in (lab / "run" / "samples.jsonl").open()]
    shaped = [sample for sample in samples if "advantages" in sample]
    assert shaped
    for sample in shaped:
        assert set(sample["advantages"]) == {0.5 if sample["reward"] > 0.5 else -0.5}
        right = sample["completion"].endswith("#" + sample["answer"])
        assert sample["reward"] == pytest.approx(right - 0.001 * len(sample["completion"]), abs=1e-6)
    with (lab / "run" / "metrics.csv").open() as file:
        assert any(row["reward/mean"] for row in csv.DictReader(file))


def test_a_shaper_without_yaml(lab):
    train = str(Path(sys.executable).with_name("rlmod-train"))
    shaper = [
        "shaper._target_=mylab.sign_only.SignOnly",
        "~shaper.divide_by_std",
        "~shaper.pool",
        "~shaper.eps",
    ]
    done = command(lab, train, *shaper, *SHORT, "trainer.max_epochs=1", "output=run", "data.validation=null")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_carries_conf_and_policies_and_runs_outside_a_checkout(tmp_path):
    built = command(
        ROOT, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), "."
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "rlmod" / "conf" / "train.yaml").is_file()
    assert (site / "rlmod" / "model" / "policies" / "tiny" / "model.safetensors").is_file()
    program = "import rlmod, rlmod.train; print(rlmod.__file__); rlmod.train.main()"
    done = command(
        tmp_path, sys.executable, "-c", program, *SHORT, "trainer.max_epochs=1", "output=run", PYTHONPATH=str(site)
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()


PACKAGE = {
    "pyproject.toml": """
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"
        [project]
        name = "mylab"
        version = "1.0"
        [tool.setuptools]
        packages = ["mylab", "mylab.conf"]
        [tool.setuptools.package-data]
        "mylab.conf" = ["*/*.yaml"]
        """,
    "mylab/__init__.py": "",
    "mylab/conf/__init__.py": "",
    "mylab/sign_only.py": SHAPER,
    "mylab/brief.py": """
        from dataclasses import dataclass

        @dataclass(frozen=True, kw_only=True)
        class Brief:
            per_character: float

            def __call__(self, texts):
                return [float(c.endswith("#" + a)) - self.per_character * len(c) for c, a in zip(texts.completions, texts.answers)]
        """,
    "mylab/plain.py": """
        from dataclasses import dataclass

        @dataclass(frozen=True, kw_only=True)
        class Plain:
            def __call__(self, logprobs, rollouts):
                return -rollouts.advantages * logprobs, {"advantage": rollouts.advantages.sum()}
        """,
    "mylab/conf/shaper/sign_only.yaml": "_target_: mylab.sign_only.SignOnly\nscale: 0.5\n",
    "mylab/conf/reward/brief.yaml": "_target_: mylab.brief.Brief\nper_character: 0.001\n",
    "mylab/conf/loss/plain.yaml": "_target_: mylab.plain.Plain\n",
}


@pytest.mark.slow
def test_a_package_with_a_shaper_a_reward_and_a_loss_in_a_fresh_environment(tmp_path):
    for name, text in PACKAGE.items():
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_text(textwrap.dedent(text))
    assert command(tmp_path, sys.executable, "-m", "venv", "env").returncode == 0
    python = str(tmp_path / "env" / "bin" / "python")
    installed = command(tmp_path, python, "-m", "pip", "install", "--quiet", "--no-deps", "./package")
    assert installed.returncode == 0, installed.stderr
    # rlmod and torch are lent from here: downloading them again would prove no more.
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    done = command(
        tmp_path, python, "-c", "from rlmod.train import main; main()", "hydra.searchpath=[pkg://mylab.conf]",
        "shaper=sign_only", "reward=brief", "loss=plain", *SHORT, "trainer.max_epochs=2", "output=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["reward/mean"]]
    assert len(rows) == 2
    assert all(float(row["train/advantage"]) != 0 and float(row["train/grad_norm"]) > 0 for row in rows)
