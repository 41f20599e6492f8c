"""The trainer and a server that fails on command, which stands in for vLLM's. The real one is in test_vllm.py."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

from rlmod.commands.serve import _weight_shapes
from rlmod.model.policy import HFPolicy
from rlmod.sampler import _server
from rlmod.sampler._access import KEY_VARIABLE, SESSION_HEADER, VERSION_HEADER, WEIGHTS_VARIABLE, ServerAccess
from rlmod.sampler.vllm_server import VLLMServer
from rlmod.types import Problem, Prompts
from tests.command_line import SHORT, answer, refused, refused_eval, run_train

KEY = "the key"


class StandIn(ThreadingHTTPServer):
    """Takes weights, and completes every prompt with its own first token, at -3 nats. Behind the middleware of the real server."""

    daemon_threads, block_on_close = True, False
    version = "default"
    freezes_at: str | None = None
    fails_at: str | None = None
    stalls_at: str | None = None
    restarts_at: str | None = None
    dies_at_update: int | None = None

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.thaw, self.frozen = Event(), Event()
        self.access = ServerAccess(self.app)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def handle_request(self) -> None:
                if server.frozen.is_set():
                    server.thaw.wait()
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
                scope = {"type": "http", "method": self.command, "path": path, "headers": headers}
                sent: list[Any] = []

                async def receive() -> Any:
                    return {"type": "http.request", "body": body}

                async def send(message: Any) -> None:
                    sent.append(message)

                asyncio.run(server.access(scope, receive, send))
                self.send_response(sent[0]["status"])
                self.end_headers()
                self.wfile.write(sent[1]["body"])

            do_GET = do_POST = handle_request

            def log_message(self, format: str, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def restart(self) -> None:
        """Forget weights and lease. What was under way is lost."""
        self.access.version = None
        self.version, self.access = "default", ServerAccess(self.app)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """Do what vLLM does, or what a test tells it to."""
        what = scope["path"].removeprefix("/")
        body: Any = json.loads((await receive())["body"] or "{}")
        status = 200
        if scope["method"] == "POST":
            self.asked.append(what)
            if self.asked.count("update_weights") == self.dies_at_update:
                self.socket.close()
                raise ConnectionAbortedError
            if what == self.freezes_at:
                self.frozen.set()
                self.thaw.wait()
            if what == self.fails_at:
                self.fails_at, status = None, 500
            if what == self.restarts_at:
                self.restarts_at = None
                self.restart()
            if what == self.stalls_at:
                self.thaw.wait()
            self.version = body.get("weight_version", self.version)
        row = {"token_ids": body.get("prompt", [0])[:1], "finish_reason": "length"}
        row |= {"logprobs": {"token_logprobs": [-3.0]}}
        answers = {
            "weight_info": {"weight_version": self.version},
            "v1/models": {"data": [{"id": "policy", "max_model_len": 100}]},
            "v1/completions": {"choices": [{**row, "index": i} for i in range(body.get("n", 1))]},
        }
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answers.get(what, {})).encode()})


@pytest.fixture(scope="module")
def shapes_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("server") / "weights.json"
    file.write_text(json.dumps(_weight_shapes(HFPolicy(path="tiny").skeleton())))
    return file


@pytest.fixture
def server(monkeypatch, shapes_file) -> Iterator[StandIn]:
    monkeypatch.setattr(_server, "HEALTH_CHECK_SECONDS", 0.5)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(shapes_file))
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
    return VLLMServer(url=server.url, completions_per_prompt=2, patience=1, startup_patience=30, requests=4)


def other_run(
    server: StandIn, path: str = "rlmod/lease", run: str = "other", session: str = "other", **headers: str
) -> Any:
    """Return the status and the body of the answer to another process."""
    body = json.dumps({"run": run, "session": session, "holder": "process 1 on elsewhere"}).encode()
    headers = {"Authorization": f"Bearer {KEY}", SESSION_HEADER: session, **headers}
    try:
        with urlopen(Request(f"{server.url}/{path}", data=body, headers=headers)) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


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
    sync = ["init_weight_transfer_engine", "pause", *updates, "resume"]
    assert server.asked == [*sync, "v1/completions", "v1/completions"]


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
    assert server.asked[2:5] == ["start_weight_update", "finish_weight_update", "start_weight_update"]


def test_a_request_that_fails_is_asked_again_with_the_rest(server, policy):
    engine = sampler(server)
    engine.sync(policy)
    server.fails_at = "v1/completions"
    assert len(engine(policy, PROMPTS, 0)) == 4


def test_after_an_error_only_what_is_missing_is_asked_for(server, policy):
    engine = sampler(server)
    engine.sync(policy)
    server.fails_at = "v1/completions"
    prompts, reported = PROMPTS.pick([0, 1] * 15), []
    rows = engine(policy, prompts, 0, on_finished=lambda *rows: reported.append(rows))
    assert rows.completion_ids is not None
    assert rows.completion_ids[:, 0].tolist() == [5, 5, 7, 7] * 15
    assert sorted(int(place) for _, places in reported for place in places) == list(range(60))
    assert all(torch.equal(part.group, places // 2) for part, places in reported)
    # The one that failed and those that were under way beside it are the most that are asked for twice.
    assert 30 < server.asked.count("v1/completions") <= 30 + engine.requests


def test_one_that_is_well_but_never_answers_is_given_up(server, policy):
    engine, server.stalls_at = replace(sampler(server), timeout=0.5), "v1/completions"
    engine.sync(policy)
    with pytest.raises(_server.ServerTimeout, match=r"no answer to /v1/completions within 0\.5 s"):
        engine(policy, PROMPTS, 0)


def test_a_restarted_server_gets_the_weights_again_and_only_the_missing_prompts(server, policy):
    engine = sampler(server)
    engine.sync(policy)
    engine(policy, PROMPTS, 0)
    server.restarts_at, before = "v1/completions", server.asked.count("update_weights")
    rows = engine(policy, PROMPTS.pick([0, 1] * 15), 0)
    assert len(rows) == 60
    assert server.asked.count("update_weights") == before + 1
    # The answer during which it restarted is refused: it could come from the weights that a server starts with.
    assert 30 < server.asked.count("v1/completions") - 2 <= 30 + engine.requests


def test_what_another_run_does_to_a_server_in_use_is_refused(server, policy):
    engine = sampler(server)
    engine.sync(policy)
    status, told = other_run(server)
    assert status == 409
    assert f"it is in use by process {os.getpid()} on {socket.gethostname()}" in told["error"]
    for path in ("start_weight_update", "pause", "v1/completions", "rlmod/release", "collective_rpc"):
        assert other_run(server, path)[0] == 409
    assert len(engine(policy, PROMPTS, 0)) == 4


def test_a_run_is_told_who_uses_the_server(server, policy):
    assert other_run(server)[0] == 200
    with pytest.raises(ValueError, match=r"in use by process 1 on elsewhere, which was last heard of 0 s ago"):
        sampler(server).prepare([], None)
    with pytest.raises(ValueError, match="in use by process 1 on elsewhere"):
        sampler(server).sync(policy)
    assert server.asked == []


def test_a_lease_ends_without_signs_of_life_and_a_run_takes_over_its_own(server, monkeypatch):
    assert other_run(server, run="A", session="1")[0] == 200
    assert other_run(server, run="B", session="2")[0] == 409
    assert other_run(server, run="A", session="2")[0] == 200  # the same run, resumed
    assert other_run(server, "reset_prefix_cache", session="1")[0] == 409  # its earlier process
    assert server.access.lease is not None
    server.access.lease.renewed -= 61
    assert other_run(server, run="B", session="3")[0] == 200
    assert other_run(server, "rlmod/release", session="3")[0] == 200
    assert other_run(server, run="A", session="1")[0] == 200


def test_a_process_renews_the_lease_of_its_last_run_while_it_trains(server, monkeypatch, tmp_path):
    monkeypatch.setattr(_server, "LEASE_SECONDS", 0.6)
    engine = sampler(server)
    engine.prepare([], None)
    monkeypatch.setattr(_server, "_run_folder", lambda: tmp_path)  # the next run of a sweep
    engine.prepare([], None)
    lease = server.access.lease
    for _ in range(100):
        if server.access.lease is not lease:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the lease was not renewed")
    assert f"the run in {tmp_path} (process {os.getpid()} on" in server.access.lease.holder


def test_a_run_finds_the_secret_of_its_lease_in_its_folder(tmp_path):
    secret = _server.stored_secret(tmp_path / ".lease")
    assert _server.stored_secret(tmp_path / ".lease") == secret
    assert (tmp_path / ".lease").stat().st_mode & 0o777 == 0o600
    assert _server.stored_secret(tmp_path / "other") != secret


def test_a_policy_of_another_shape_changes_nothing(server, policy):
    from transformers import AutoConfig, AutoModelForCausalLM

    engine = sampler(server)
    engine.sync(policy)
    asked = list(server.asked)
    config = AutoConfig.from_pretrained(HFPolicy(path="tiny").location, vocab_size=1000)
    with pytest.raises(
        ValueError, match=r"weights differ, such as model\.embed_tokens\.weight \(\[\d+, \d+\] on the server, \[1000, "
    ):
        engine.sync(AutoModelForCausalLM.from_config(config))
    assert server.asked == asked
    assert len(engine(policy, PROMPTS, 0)) == 4


def test_completions_of_other_weights_are_refused(server, policy):
    engine = sampler(server)
    engine.sync(policy)
    session = {SESSION_HEADER: _server.SESSION}
    assert other_run(server, "v1/completions", **session)[0] == 412
    assert other_run(server, "v1/completions", **session, **{VERSION_HEADER: "old"})[0] == 412
    assert other_run(server, "start_weight_update", **session)[0] == 200
    held = {VERSION_HEADER: server.version}
    assert other_run(server, "v1/completions", **session, **held)[0] == 412  # an update is not complete


@pytest.mark.parametrize(
    "path", ["health", "metrics", "v1/completions", "update_weights", "rlmod/lease", "collective_rpc"]
)
def test_no_route_answers_without_the_key(server, path):
    for key in ("", "Bearer wrong", f"Basic {KEY}", KEY):
        assert other_run(server, path, Authorization=key)[0] == 401
    assert server.asked == []


def test_a_wrong_key_is_named_before_weights_load(server, monkeypatch, tmp_path):
    monkeypatch.setenv(KEY_VARIABLE, "wrong")
    with pytest.raises(
        ValueError, match=r"does not accept the API key of the environment variable RLMOD_API_KEY: set sampler\.api_key"
    ):
        sampler(server).prepare([], None)
    (tmp_path / "api_key").write_text(KEY + "\n")
    replace(sampler(server), api_key_file=str(tmp_path / "api_key")).prepare([], None)


def test_a_server_that_is_starting_is_waited_for(server, monkeypatch, tmp_path, caplog):
    """It writes its key when it starts, and listens later."""
    monkeypatch.setattr(_server, "REMINDER_SECONDS", 0.1)
    engine = replace(sampler(server), api_key_file=str(tmp_path / "api_key"), startup_patience=30)
    Timer(1.5, lambda: (tmp_path / "api_key").write_text(KEY)).start()
    engine.prepare([], None)
    waits = [record.message for record in caplog.records if "does not answer yet" in record.message]
    assert len(waits) >= 2
    assert "api_key" in waits[0]


def test_a_server_whose_port_refuses_is_waited_for_longer_than_one_that_is_silent(server, policy):
    engine = replace(sampler(server), startup_patience=4)
    engine.sync(policy)
    server.frozen.set()
    for silent, limit in ((True, "patience"), (False, "startup_patience")):
        started = time.monotonic()
        with pytest.raises(_server.ServerTimeout, match=rf"which is sampler\.{limit} "):
            engine.sync(policy)
        assert (time.monotonic() - started < 4) == silent
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("decoding", ["sampler.top_p=1", "sampler.greedy=true", "sampler.top_p=0.9"])
def test_an_evaluation_of_what_the_server_holds_instead_is_refused(server, monkeypatch, tmp_path, decoding):
    message = refused_eval(
        monkeypatch, "sampler=vllm_server", f"sampler.url={server.url}", "data.validation.size=8", decoding,
        "sampler.completions_per_prompt=1", f"output={tmp_path}",
    )  # fmt: skip
    assert "more than sampler.max_difference=0.1" in message
    assert not (tmp_path / "summary.json").exists()
    assert KEY not in (tmp_path / "config.yaml").read_text()


def test_a_validation_of_what_the_server_holds_instead_is_refused(server, monkeypatch, tmp_path):
    message = refused(
        monkeypatch, tmp_path, *SHORT, "sampler=vllm_server", f"sampler.url={server.url}", "validation.sampler.top_p=0.9"
    )  # fmt: skip
    assert "more than sampler.max_difference=0.1" in message
    assert server.asked.count("update_weights") == 1  # before the first iteration, which would notice it too
    assert (tmp_path / "refused" / ".lease").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_run_that_loses_its_server_keeps_every_finished_iteration(server, monkeypatch, tmp_path):
    words = (*SHORT, "data.validation=null", "sampler=vllm_server", f"sampler.url={server.url}", "trainer.max_epochs=3")
    words = (*words, "sampler.startup_patience=1", "sampler.max_difference=100", f"output={tmp_path}")
    monkeypatch.setattr(server, "dies_at_update", 3)
    message = answer(lambda: run_train(monkeypatch, *words))
    assert "which is sampler.startup_patience" in message
    (checkpoint,) = (tmp_path / "checkpoints").glob("step-*")
    assert checkpoint.name == "step-000002"


@pytest.mark.slow
def test_the_ranks_of_a_run_share_its_lease(server, tmp_path):
    words = (
        *SHORT,
        "sampler=vllm_server",
        f"sampler.url={server.url}",
        "trainer.max_epochs=2",
        "strategy=ddp",
        "trainer.devices=2",
    )
    words = (*words, "data.validation=null", "sampler.max_difference=100", f"output={tmp_path}")
    run = subprocess.run(
        [sys.executable, "-m", "rlmod.train", *words], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert server.asked.count("update_weights") == 2
    assert server.asked.count("v1/completions") == 16  # eight prompts per iteration, of both ranks together
    assert server.access.lease is None  # released
