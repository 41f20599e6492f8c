"""vLLM, the real engine, with the shipped tiny policy."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

from rlmod.adapter.lora import LoRA
from rlmod.data.arithmetic import Arithmetic
from rlmod.model.logprob_pass import logprob_pass
from rlmod.model.policy import HFPolicy
from rlmod.rollout.metrics import check_agreement, sampler_agreement
from rlmod.rollout.prompts import PromptEncoder
from rlmod.rollout.validation import check_engine
from rlmod.sampler import vllm_server
from rlmod.sampler._weights import Publisher, Writable
from rlmod.sampler.hf import HF
from rlmod.types import Rollouts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm, which make test-vllm installs"),
]
TINY = HFPolicy(path="tiny")


@pytest.fixture(scope="module")
def prompts():
    problems = Arithmetic(split="held_out", size=16)()
    return PromptEncoder().encode(problems, TINY.tokenizer()).batch(range(16))


@pytest.fixture
def policy():
    """Not the shipped weights: what was loaded before must not pass for what was handed over."""
    model = TINY.model(TINY.tokenizer()).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=draw))
    return model


def sampler(**settings):
    from rlmod.sampler.vllm import VLLM

    return VLLM(**{"completions_per_prompt": 4, "max_new_tokens": 48, "max_model_len": 256, **settings})


def apart(policy, rollouts, temperature=1.0):
    with torch.no_grad():
        return sampler_agreement(logprob_pass(policy, rollouts, temperature, rows=64))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_its_log_probabilities_are_the_policys(policy, prompts, temperature):
    engine = sampler(temperature=temperature)
    engine.sync(policy)
    rollouts = engine(policy, prompts, 0)
    assert apart(policy, rollouts, temperature)["sampler/difference_max"] < 1e-4
    assert rollouts.group.tolist() == [i for i in range(16) for _ in range(4)]
    assert rollouts.logprobs is None and rollouts.entropy is None  # noqa: PT018  these are the policy's to give
    eos = policy.generation_config.eos_token_id[0]
    ids, mask = rollouts.completion_ids, rollouts.mask
    last = ids.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    assert torch.equal(last == eos, ~rollouts.truncated)
    assert ((ids == eos) & mask).sum(1).tolist() == (~rollouts.truncated).int().tolist()


def test_greedy_completions_are_those_of_transformers(policy, prompts):
    settings = {"completions_per_prompt": 1, "max_new_tokens": 32, "greedy": True}
    engine = sampler(**settings)
    engine.sync(policy)
    ours, theirs = engine(policy, prompts, 0), HF(**settings)(policy, prompts, 0)
    assert torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.completion_ids * ours.mask, theirs.completion_ids * theirs.mask)
    assert ours.sampler_logprobs is None


def test_a_stop_string_means_the_same_as_to_transformers(policy, prompts):
    settings = {"completions_per_prompt": 1, "max_new_tokens": 32, "greedy": True, "stop": ["#1", ";2", "=4"]}
    engine = sampler(**settings)
    engine.sync(policy)
    ours, theirs = engine(policy, prompts, 0), HF(**settings)(policy, prompts, 0)
    assert torch.equal(ours.completion_ids * ours.mask, theirs.completion_ids * theirs.mask)
    assert torch.equal(ours.truncated, theirs.truncated)
    last = ours.completion_ids.gather(1, ours.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert (~ours.truncated & (last != policy.generation_config.eos_token_id[0])).any()
    sampled = replace(engine, greedy=False, completions_per_prompt=4)(policy, prompts, 0)
    assert apart(policy, sampled)["sampler/difference_max"] < 1e-4
    texts = [TINY.tokenizer().decode(ids[mask]) for ids, mask in zip(sampled.completion_ids, sampled.mask, strict=True)]
    for text in texts:
        assert not any(stop in text[:-1] for stop in engine.stop)


def test_the_same_seed_gives_the_same_rows_and_rows_do_not_share_one(policy, prompts):
    engine = sampler(temperature=2.0, max_new_tokens=12)
    engine.sync(policy)
    first, again, other = (engine(policy, prompts, seed) for seed in (1, 1, 2))
    assert torch.equal(first.completion_ids, again.completion_ids)
    for one, two in ((first, other), (first, first)):  # of two seeds, and of two rows of a group
        rows = one.completion_ids[:, :3].view(16, 4, 3)[:, 0], two.completion_ids[:, :3].view(16, 4, 3)[:, 1]
        assert (rows[0] == rows[1]).all(1).float().mean() < 0.5
    assert not torch.equal(first.completion_ids, other.completion_ids)


def test_old_weights_are_noticed(policy, prompts):
    engine = sampler()
    engine.sync(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.3)
    metrics = apart(policy, engine(policy, prompts, 0))
    with pytest.raises(ValueError, match=r"more than sampler\.max_difference=0\.1"):
        check_agreement(engine, metrics)
    engine.sync(policy)
    assert apart(policy, engine(policy, prompts, 0))["sampler/difference_max"] < 1e-4


def test_an_adapter_is_handed_over_with_its_base(prompts):
    specification = replace(TINY, adapter=LoRA(rank=4))
    policy = specification.model(TINY.tokenizer()).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05, generator=draw)
    before = copy.deepcopy(policy.state_dict())
    engine = sampler()
    engine.sync(policy)
    assert apart(policy, engine(policy, prompts, 0))["sampler/difference_max"] < 1e-4
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())


def test_syncs_leak_no_memory(prompts):
    """The weights are a good part of the process: a set of them that was kept would show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"vocab_size": 20_000, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    policy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY.location, **shape))
    weights = sum(weight.nbytes for weight in policy.parameters())
    engine = sampler()
    sizes = []
    for seed in range(4):
        engine.sync(policy)
        engine(policy, prompts, seed)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))
    assert sizes[-1] <= 1.05 * sizes[0]  # three syncs after the first
    assert sizes[-1] - sizes[0] < weights


def test_what_a_failed_call_left_in_the_engine_does_not_reach_the_next(policy, prompts):
    engine = sampler()
    engine.sync(policy)
    first = engine(policy, prompts, 0)

    def fails(rows: Rollouts, places: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(policy, prompts, 1, on_finished=fails)
    reported: list[tuple[Rollouts, torch.Tensor]] = []
    again = engine(policy, prompts, 0, on_finished=lambda *rows: reported.append(rows))
    assert torch.equal(again.completion_ids * again.mask, first.completion_ids * first.mask)
    assert sorted(torch.cat([places for _, places in reported]).tolist()) == list(range(len(again)))
    for rows, places in reported:
        mine = again.rows(places).trimmed()
        assert torch.equal(rows.group, mine.group)
        assert torch.equal(rows.trimmed().completion_ids, mine.completion_ids)


def test_it_leaves_the_random_states_alone(policy, prompts):
    engine = sampler()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine.sync(policy)
    engine(policy, prompts, 0)
    assert torch.equal(torch.rand(3), expected)


def test_heads_that_vllm_has_not_are_named_before_it_stumbles():
    strong = HFPolicy(path="strong")
    with pytest.raises(ValueError, match="heads have 24 dimensions"):
        sampler(engine={"seed": 1}).sync(strong.model(strong.tokenizer()))


def command(name: str, *overrides: str) -> list[str]:
    module = "rlmod.train" if name == "train" else f"rlmod.commands.{name}"
    return [sys.executable, "-m", module, *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def trained(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("train", *overrides), env=environment(), capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.slow
def test_the_quickstart_learns_with_it(tmp_path):
    run = trained("experiment=quickstart", "sampler=vllm", f"output={tmp_path}")
    assert run.returncode == 0, run.stderr[-2000:]
    held_out = json.loads((tmp_path / "result.json").read_text())["held_out"]
    assert held_out["after"] >= 0.90


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_two_ranks_have_an_engine_each(strategy, tmp_path):
    run = trained("experiment=quickstart", "sampler=vllm", f"strategy={strategy}", "trainer.devices=2", "trainer.max_epochs=2",
                  "data.validation.size=32", "sampler.max_difference=1e-4", f"output={tmp_path}")  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert "sampler/difference" in (tmp_path / "metrics.csv").read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RealServer:
    """A server that rlmod-serve starts, and that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, f"http://127.0.0.1:{free_port()}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command("serve", f"sampler.url={self.url}", f"output={self.folder}", "engine.max_model_len=256"),
                env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def sampler(self, **settings):
        from rlmod.sampler.vllm_server import VLLMServer

        file = str(self.folder / "api_key")
        fixed = {
            "url": self.url,
            "api_key_file": file,
            "completions_per_prompt": 4,
            "max_new_tokens": 48,
            "requests": 8,
            "startup_patience": 1200.0,
        }
        return VLLMServer(**{**fixed, **settings})

    def status(self, path: str, **headers: str) -> int:
        """The status of an answer to somebody else."""
        try:
            with urlopen(Request(f"{self.url}/{path}", data=b"{}", headers=headers), timeout=60) as answer:
                return answer.status
        except HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def stopped_server(tmp_path_factory):
    server = RealServer(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(stopped_server):
    """It takes a minute to start; a sampler waits for it."""
    stopped_server.start()
    return stopped_server


@pytest.mark.slow
def test_a_run_and_its_server_may_be_started_together(server, policy, prompts):
    engine = server.sampler()
    engine.prepare([], None)
    engine.sync(policy)
    assert apart(policy, engine(policy, prompts, 0))["sampler/difference_max"] < 1e-4
    assert (server.folder / "api_key").stat().st_mode & 0o777 == 0o600
    taken = subprocess.run(
        command("serve", f"sampler.url={engine.url}"), env=environment(), capture_output=True, text=True, check=False
    )
    assert taken.returncode == 1
    assert "cannot listen there" in taken.stderr


@pytest.mark.slow
def test_stop_strings_end_the_same_completions_on_a_server(server, policy, prompts):
    stop = ["#1", ";2", "=4"]
    engine = server.sampler(greedy=True, stop=stop)
    engine.sync(policy)
    theirs = HF(completions_per_prompt=4, max_new_tokens=48, greedy=True, stop=stop)(policy, prompts, 0)
    ours = engine(policy, prompts, 0)
    assert torch.equal(ours.completion_ids * ours.mask, theirs.completion_ids * theirs.mask)


@pytest.mark.slow
def test_somebody_else_can_do_nothing_to_a_server_in_use(server, policy, prompts):
    engine = server.sampler()
    engine.sync(policy)
    key = (server.folder / "api_key").read_text().strip()
    for path in ("v1/completions", "start_weight_update", "collective_rpc", "pause", "reset_prefix_cache", "metrics"):
        assert server.status(path) == 401
        assert server.status(path, Authorization=f"Bearer {key}") == 409
    assert apart(policy, engine(policy, prompts, 0))["sampler/difference_max"] < 1e-4
    assert key not in server.log
    assert vllm_server._publisher(engine.weights_host, engine.weights_port).secret not in server.log


@pytest.mark.slow
def test_updates_that_are_refused_or_fail_leave_a_server_that_works(server, policy, prompts, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    engine = server.sampler()
    engine.sync(policy)
    first = engine(policy, prompts, 0)
    larger = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY.location, vocab_size=1000))
    with pytest.raises(ValueError, match="the server has another policy"):
        engine.sync(larger)
    assert torch.equal(engine(policy, prompts, 0).completion_ids, first.completion_ids)

    def breaks_off(publisher: Publisher, file: Writable) -> None:
        whole = BytesIO()
        write(publisher, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])

    write = Publisher.write
    monkeypatch.setattr(Publisher, "write", breaks_off)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.1)
    with pytest.raises(ConnectionError, match="/update_weights failed"):
        engine.sync(policy)
    monkeypatch.undo()
    engine.sync(policy)
    assert apart(policy, engine(policy, prompts, 0))["sampler/difference_max"] < 1e-4


@pytest.mark.slow
def test_an_evaluation_notices_another_policy_behind_greedy_completions(server, policy, prompts):
    engine = server.sampler(greedy=True)
    engine.sync(policy)
    rows = engine(policy, prompts, 0)
    check_engine(policy, prompts, rows, engine, 0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.3)
    with pytest.raises(ValueError, match=r"more than sampler\.max_difference=0\.1"):
        check_engine(policy, prompts, rows, engine, 0)


@pytest.mark.slow
def test_requests_that_an_update_overtakes_are_refused_and_the_server_lives(server, policy, prompts):
    engine = server.sampler()
    engine.sync(policy)
    endless = {"n": 16, "max_tokens": 240, "ignore_eos": True, "return_token_ids": True}
    bodies = {i: {**endless, "prompt": ids} for i, (ids, _) in enumerate(engine.build_requests(policy, prompts, 0))}
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(lambda: list(engine._server.post_all("v1/completions", bodies)))
        time.sleep(0.3)
        engine.sync(policy)
        with pytest.raises(ConnectionError, match="does not hold this run's current weights"):
            answers.result(timeout=300)
    assert apart(policy, engine(policy, prompts, 0))["sampler/difference_max"] < 1e-4


@pytest.mark.slow
def test_a_server_is_given_the_weights_again_when_it_comes_back_and_is_missed_when_it_does_not(server, policy, prompts):
    engine = server.sampler()
    engine.sync(policy)
    first = engine(policy, prompts, 0)
    server.kill()
    server.start()
    again = engine(policy, prompts, 0)  # it waits
    # Sampled from the dummy weights that the server came back with, these would be others.
    assert torch.equal(again.completion_ids * again.mask, first.completion_ids * first.mask)
    server.kill()
    with pytest.raises(ConnectionError, match="Start the server with rlmod-serve"):
        replace(engine, startup_patience=3)(policy, prompts, 0)
