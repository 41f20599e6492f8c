"""The GPU kit: pieces join, a broken one is refused, results survive whatever a stage says."""

import json
import re
from pathlib import Path

import pytest

from tools.gpu import device, prepare, stages


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "GPU", tmp_path / "sent")
    monkeypatch.setattr(device, "KEPT", tmp_path / "kept")
    (tmp_path / "sent" / "core").mkdir(parents=True)
    return tmp_path


def test_pieces_that_come_with_different_calls_join(places, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 4)
    data = b"ten bytes!"
    prepare.write_pieces(data, places / "sent", "r", places / "sent" / "core" / "real.json")
    device.keep_pieces()
    second = places / "sent" / "r2" / "part"
    content = second.read_bytes()
    assert device.join("r", "real") == data
    second.write_bytes(b"????")
    device.keep_pieces()
    assert device.join("r", "real") == "the joined pieces have another digest"
    second.write_bytes(content)
    device.keep_pieces()
    (places / "kept" / "r3" / "part").unlink()
    assert device.join("r", "real") == "pieces missing: r3"
    assert "no vllm.json" in device.join("v", "vllm")


def test_results_survive_any_key_a_stage_says(tmp_path):
    results = device.Results(tmp_path)
    results.note("memory", {"status": 0, "wall": 1.0, "found": {"seconds": 3, "status": "mine", "stage": 1}})
    results.note("next", {"skipped": "too late"})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["memory"]["found"]["seconds"] == 3
    assert found["next"] == {"skipped": "too late"}


def test_every_stage_of_the_page_exists():
    page = (Path(device.__file__).parent / "README.md").read_text()
    commands = re.findall(r"device\.py \d+ ([^`]+)`", page)
    named = {word.split("=")[0] for command in commands for word in command.split()}
    assert named <= set(device.LIMITS)
    assert all(hasattr(stages, name) for name in set(device.LIMITS) - {"unpack"})
