"""rlmod-export: what is exported loads in transformers and is the trained policy, from a run of whatever strategy."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlmod.commands import export
from tests.command_line import SHORT, run_train
from tests.processes import ended, started
from tests.runs import finished

QUICK = (*SHORT, "data.validation=null", "optimizer.lr=1e-2", "trainer.max_epochs=2", "callbacks.checkpoints.every=1")
SAMPLE = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(SAMPLE).logits


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The policy's weights as trainer.ckpt has them: a file, or a folder with a file a rank."""
    file = checkpoint / "trainer.ckpt"
    if file.is_dir():
        dcp_to_torch_save(file, checkpoint.parent / "joined.ckpt")
        file = checkpoint.parent / "joined.ckpt"
    saved = torch.load(file, weights_only=False)
    state = saved["state_dict"] if "state_dict" in saved else saved["model"]  # Lightning's names
    return {name.removeprefix("policy."): value for name, value in state.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.mktemp("run") / "a", *QUICK)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.mktemp("run") / "lora", *QUICK, "adapter=lora")


def expected(checkpoint: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained("rlmod/model/policies/tiny").eval()
    model.load_state_dict(trained(checkpoint))
    with torch.no_grad():
        return model(SAMPLE).logits


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        export.main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_is_exported_from_its_newest_checkpoint_and_can_be_trained_on(run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "new" / "exported"
    export.main([str(run), str(output)])
    assert capsys.readouterr().out.startswith(f"{output}: the policy of {run / 'checkpoints' / 'step-000002'}")
    names = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in output.iterdir()} == names
    torch.testing.assert_close(logits(output), expected(run / "checkpoints" / "step-000002"), atol=0, rtol=0)
    assert (
        AutoTokenizer.from_pretrained(output).get_vocab()
        == AutoTokenizer.from_pretrained("rlmod/model/policies/tiny").get_vocab()
    )
    run_train(
        monkeypatch, *QUICK, "policy=hf", f"policy.path={output}", "policy.dtype=float32", f"output={tmp_path / 'b'}"
    )


def test_a_broken_checkpoint_is_named_and_passed_over(run, tmp_path, caplog, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    broken, whole = folder / "checkpoints" / "step-000002", folder / "checkpoints" / "step-000001"
    os.truncate(broken / "policy" / "model.safetensors", 1000)
    assert export.export(folder, tmp_path / "out") == whole
    assert f"{broken} is damaged and is skipped: policy/model.safetensors has 1,000 of" in caplog.text
    torch.testing.assert_close(logits(tmp_path / "out"), expected(whole), atol=0, rtol=0)
    assert "no complete checkpoint found" in refused(capsys, broken, tmp_path / "other")


def test_weights_are_rounded_to_another_dtype(run, tmp_path):
    export.main([str(run), str(tmp_path / "out"), "--dtype", "bfloat16"])
    state = trained(run / "checkpoints" / "step-000002")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, state[name].bfloat16()) for name, value in weights.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_an_adapter_is_exported_as_it_is_or_merged(adapted, tmp_path):
    export.main([str(adapted), str(tmp_path / "adapter")])
    export.main([str(adapted), str(tmp_path / "merged"), "--merge"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    # By hand: W + (alpha / rank) B A of one layer; the logits of all.
    name = "model.layers.1.mlp.up_proj"
    base = load_file("rlmod/model/policies/tiny/model.safetensors")[f"{name}.weight"]
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(merged, base + 2.0 * b @ a)
    assert (merged - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(tmp_path / "adapter"), atol=1e-4, rtol=0)


def test_what_cannot_be_exported_is_said(run, adapted, tmp_path, capsys):
    assert "there is no such folder" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert "no complete checkpoint found" in refused(capsys, tmp_path, tmp_path / "out")
    policy = run / "checkpoints" / "step-000002" / "policy"
    assert f"give the checkpoint, {policy.parent}" in refused(capsys, policy, tmp_path / "out")
    assert "no adapter to merge" in refused(capsys, run, tmp_path / "out", "--merge")
    assert "add --merge" in refused(capsys, adapted, tmp_path / "out", "--dtype", "bfloat16")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    assert "is not overwritten" in refused(capsys, run, tmp_path / "mine")
    assert "could not be written" in refused(capsys, run, "/proc/out")


def test_a_config_that_somebody_else_wrote_is_not_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("RLMOD_TEST_KEY", "s3cret-of-somebody")
    (tmp_path / "config.yaml").write_text("policy: {dtype: '${oc.env:RLMOD_TEST_KEY}'}")
    with pytest.raises(
        ValueError, match=r"config\.yaml: policy\.dtype must be one of .*, got '\$\{oc\.env:RLMOD_TEST_KEY\}'"
    ):
        vars(export)["_convert"](tmp_path, tmp_path / "out", None)


def test_a_disk_that_is_full_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    def full(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    assert "No space left on device" in refused(capsys, run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


SHARDED = "trainer.strategy.sharded_checkpoints=true"
STRATEGIES = {
    "ddp": ("strategy=ddp",),
    "fsdp": ("strategy=fsdp",),
    "fsdp2": ("strategy=fsdp2",),
    "fsdp2, sharded": ("strategy=fsdp2", SHARDED),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_on_two_ranks_is_exported(name, tmp_path):
    """The logits of what is exported are those of the weights in trainer.ckpt, joined by PyTorch's own tool where they are sharded."""
    two = ("trainer.devices=2", "trainer.accelerator=cpu", f"output={tmp_path / 'run'}")
    ended(started(*QUICK, *STRATEGIES[name], *two))
    checkpoint = export.export(tmp_path / "run", tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), expected(checkpoint), atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_adapter_trained_on_two_ranks_is_exported_merged(name, tmp_path):
    two = ("trainer.devices=2", "trainer.accelerator=cpu", "adapter=lora", f"output={tmp_path / 'run'}")
    ended(started(*QUICK, *STRATEGIES[name], *two))
    checkpoint = export.export(tmp_path / "run", tmp_path / "out", merge=True)
    state = trained(checkpoint)
    layer = "base_model.model.model.layers.2.self_attn.q_proj"
    a, b = (state[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.self_attn.q_proj.weight"]
    torch.testing.assert_close(merged, state[f"{layer}.base_layer.weight"] + 2.0 * b @ a)
    assert b.abs().max() > 0
