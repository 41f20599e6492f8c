import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlmod.model.logprobs import completion_logits
from rlmod.model.policy import SHIPPED, HFPolicy
from rlmod.model.saving import save_policy
from rlmod.types import build_rollouts


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
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1  # who may read one may read all


def test_bad_dtype_is_named():
    with pytest.raises(ValueError, match=r"policy\.dtype"):
        HFPolicy(path="tiny", dtype="int8")


def test_padding_on_the_left_moves_no_position():
    """Absolute positions show a shift; rotary ones depend on distances only."""
    torch.manual_seed(0)
    settings = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20, n_positions=32, bos_token_id=0, eos_token_id=0)
    policy = GPT2LMHeadModel(settings).eval()
    prompt, completion = torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7]])
    mask = torch.ones_like(prompt, dtype=torch.bool)
    plain = completion_logits(policy, build_rollouts(prompt_ids=prompt, prompt_mask=mask, completion_ids=completion))
    padded = torch.nn.functional.pad(prompt, (4, 0), value=9), torch.nn.functional.pad(mask, (4, 0))
    again = completion_logits(
        policy, build_rollouts(prompt_ids=padded[0], prompt_mask=padded[1], completion_ids=completion)
    )
    torch.testing.assert_close(again, plain)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickled_model_is_read_without_executing_what_it_holds(tmp_path):
    folder = shutil.copytree(SHIPPED / "tiny", tmp_path / "theirs", ignore=shutil.ignore_patterns("*.safetensors"))
    policy = HFPolicy(path=str(folder))
    torch.save({"weight": Bomb(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"policy\.path=.*could execute code; save it as safetensors"):
        policy.model(policy.tokenizer())
    assert not (tmp_path / "executed").exists()
    weights = HFPolicy(path="tiny").model(policy.tokenizer()).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    assert all(
        torch.equal(value, weights[name]) for name, value in policy.model(policy.tokenizer()).state_dict().items()
    )


def test_code_that_comes_with_a_model_is_neither_executed_nor_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = shutil.copytree(SHIPPED / "tiny", tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nC = M = object\n")
    policy = HFPolicy(path=str(folder))
    for load in (policy.shape, lambda: policy.model(HFPolicy(path="tiny").tokenizer())):
        with pytest.raises(ValueError, match="contains custom code"):
            load()
    assert not (tmp_path / "executed").exists()
