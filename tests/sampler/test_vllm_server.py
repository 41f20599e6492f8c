"""What the trainer does about a server that fails it: a stand-in that fails on command. The real one is in test_vllm.py."""

import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest
import torch

from rlmod.model.policy import HFPolicy
from rlmod.sampler import _server, vllm_server
from rlmod.sampler.vllm_server import VLLMServer
from rlmod.types import Problem, Prompts


class StandIn(ThreadingHTTPServer):
    """Takes weights, and completes every prompt with its own first token."""

    daemon_threads, block_on_close = True, False
    version = "default"
    freezes_at: str | None = None
    fails_at: str | None = None
    stalls_at: str | None = None
    changes_to: str | None = None

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.thaw, self.frozen = Event(), Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if server.frozen.is_set():
                    server.thaw.wait()
                models = {"data": [{"id": "policy", "max_model_len": 100}]}
                self.answer({"/weight_info": {"weight_version": server.version}, "/v1/models": models}.get(self.path))

            def do_POST(self) -> None:
                what = self.path.removeprefix("/")
                body: Any = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
                server.asked.append(what)
                if what == server.freezes_at:
                    server.frozen.set()
                    server.thaw.wait()
                if what == server.fails_at:
                    server.fails_at = None
                    self.send_error(500)
                    return
                server.version = body.get("weight_version", server.version)
                if what == server.stalls_at:
                    server.thaw.wait()
                if what == "v1/completions":
                    server.version = server.changes_to or server.version
                row = {"token_ids": body.get("prompt", [0])[:1], "finish_reason": "length"}
                row |= {"logprobs": {"token_logprobs": [-1.0]}}
                self.answer({"choices": [{**row, "index": i} for i in range(body.get("n", 1))]})

            def answer(self, body: Any) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def server(monkeypatch) -> Iterator[StandIn]:
    monkeypatch.setattr(_server, "HEALTH_CHECK_SECONDS", 0.2)
    server = StandIn()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.thaw.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def policy():
    tiny = HFPolicy(path="tiny")
    return tiny.model(tiny.tokenizer())


def sampler(server: StandIn) -> VLLMServer:
    return VLLMServer(
        url=f"http://127.0.0.1:{server.server_address[1]}", completions_per_prompt=2, patience=0.5, requests=4
    )


PROMPTS = Prompts(
    ids=torch.tensor([[5, 6], [7, 8]]),
    mask=torch.ones(2, 2, dtype=torch.bool),
    problems=(Problem(prompt="", answer="", source=""),) * 2,
)


def test_its_length_is_the_servers(server):
    assert sampler(server).max_model_len == 100


def test_it_is_given_weights_and_asked_prompt_by_prompt(server, policy):
    engine = sampler(server)
    engine.prepare([], None)
    engine.sync(policy)
    rows = engine(policy, PROMPTS, 0)
    assert rows.completion_ids is not None
    assert rows.completion_ids[:, 0].tolist() == [5, 5, 7, 7]
    updates = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"]
    assert server.asked == [*updates, "v1/completions", "v1/completions"]


@pytest.mark.parametrize("what", ["start_weight_update", "update_weights", "v1/completions"])
def test_one_that_freezes_is_missed_once_its_patience_is_over(server, policy, what):
    engine, server.freezes_at = sampler(server), what

    def collect() -> None:
        engine.sync(policy)
        engine(policy, PROMPTS, 0)

    with pytest.raises(_server.ServerTimeout, match="Start the server with rlmod-serve"):
        collect()
    assert server.asked.count(what) <= len(PROMPTS)  # it is not asked again


def test_an_update_that_an_earlier_trainer_left_open_is_closed_first(server, policy):
    engine, server.fails_at = sampler(server), "start_weight_update"
    engine.sync(policy)
    assert server.asked[:3] == ["start_weight_update", "finish_weight_update", "start_weight_update"]


def test_a_request_that_fails_is_asked_again_with_the_rest(server, policy):
    engine = sampler(server)
    engine.sync(policy)
    server.fails_at = "v1/completions"
    assert len(engine(policy, PROMPTS, 0)) == 4


def test_after_an_error_only_what_is_missing_is_asked_for(server, policy):
    engine = sampler(server)
    engine.sync(policy)
    server.fails_at = "v1/completions"
    prompts, told = PROMPTS.pick([0, 1] * 15), []
    rows = engine(policy, prompts, 0, on_finished=lambda *rows: told.append(rows))
    assert rows.completion_ids is not None
    assert rows.completion_ids[:, 0].tolist() == [5, 5, 7, 7] * 15
    assert sorted(int(place) for _, places in told for place in places) == list(range(60))
    assert all(torch.equal(part.group, places // 2) for part, places in told)
    # The one that failed and those that were under way beside it are the most that are asked for twice.
    assert 30 < server.asked.count("v1/completions") <= 30 + engine.requests


def test_one_that_is_well_but_never_answers_is_given_up(server, policy):
    engine, server.stalls_at = replace(sampler(server), timeout=0.5), "v1/completions"
    engine.sync(policy)
    with pytest.raises(_server.ServerTimeout, match=r"no answer to /v1/completions within sampler.timeout"):
        engine(policy, PROMPTS, 0)


@pytest.mark.parametrize(
    ("version", "words"),
    [(vllm_server.INITIAL_VERSION, "was restarted during sampling"), ("another's", "another run has sent")],
)
def test_other_weights_are_noticed_before_their_completions_count(server, policy, version, words):
    engine = sampler(server)
    engine.sync(policy)
    server.changes_to = version
    with pytest.raises(ValueError, match=words):
        engine(policy, PROMPTS, 0)
