import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from rlmod.policy import SHIPPED, HFPolicy, save_policy


def changed_tokenizer(tmp_path, **changes):
    folder = tmp_path / "policy"
    # Without config.json, by which transformers would take Qwen's own tokenizer class, with its own defaults.
    shutil.copytree(SHIPPED / "tiny", folder, ignore=shutil.ignore_patterns("*config.json", "*.safetensors"))
    shutil.copy(SHIPPED / "tiny" / "tokenizer_config.json", folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for name, value in changes.items():
        settings.pop(name, None)
        if value is not None:
            settings[name] = value
    file.write_text(json.dumps(settings))
    return folder


def test_a_tokenizer_without_a_pad_token_pads_with_eos(tmp_path):
    folder = changed_tokenizer(tmp_path, pad_token=None)
    tokenizer = HFPolicy(path=str(folder)).tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    assert HFPolicy(path="tiny").model(tokenizer).generation_config.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    folder = changed_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match="no EOS token"):
        HFPolicy(path=str(folder)).tokenizer()


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer = HFPolicy(path="tiny").tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(10)])
    with pytest.raises(ValueError, match=r"109 tokens, the model only 99|do not belong together"):
        HFPolicy(path="tiny").model(tokenizer)


def test_the_shipped_policies_are_small_and_named_by_name():
    for name in ("tiny", "strong"):
        size = sum(file.stat().st_size for file in (SHIPPED / name).iterdir())
        assert size < 3_000_000
        assert HFPolicy(path=name).location == str(SHIPPED / name)


def test_saved_and_loaded_is_the_same(tmp_path):
    tokenizer = HFPolicy(path="tiny").tokenizer()
    model = HFPolicy(path="tiny").model(tokenizer)
    assert model.training
    save_policy(model, tokenizer, tmp_path / "saved")
    again = HFPolicy(path=str(tmp_path / "saved")).model(tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()


def test_bad_dtype_is_named():
    with pytest.raises(ValueError, match=r"policy\.dtype"):
        HFPolicy(path="tiny", dtype="int8")
