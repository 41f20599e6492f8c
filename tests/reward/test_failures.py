"""Completions on which a reward fails: the settings, the pool of workers, and the metrics."""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from rlmod.config.build import build_reward
from rlmod.reward._compute import RewardError, compute_rewards
from rlmod.reward._failures import agree_on_reward_errors, check_failure_shares, failure_metrics, has_value
from rlmod.reward._pool import Pool, default_workers
from rlmod.reward._pool_server import PoolSettings
from rlmod.reward._supervised import Supervised
from rlmod.reward.exact_match import ExactMatch
from rlmod.reward.format import Format
from rlmod.reward.grop import Grop
from rlmod.reward.weighted import Weighted
from rlmod.types import Texts
from tests.config.composing import composed
from tests.ranks import on_ranks
from tests.reward import faulty

REPOSITORY = Path(__file__).parents[2]


def texts(*completions: str) -> Texts:
    return Texts(completions=completions, answers=[""] * len(completions))


def supervised(**settings):
    return Supervised(supervised=faulty.by_text, **settings)


def test_ranks_raise_the_error_of_one_of_them_together():
    def stage(rank: int) -> str:
        with agree_on_reward_errors():
            if rank == 1:
                raise RewardError("503")
        return "went on"

    first, second = on_ranks(stage)
    assert (type(first), str(first)) == (RewardError, "rank 1: 503")
    assert (type(second), str(second)) == (RewardError, "503")
    assert on_ranks(lambda rank: stage(0)) == ["went on", "went on"]
    with pytest.raises(RewardError, match=r"^503$"):
        stage(1)


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("on_error", ["zero", "abstain"])
def test_a_row_that_fails_leaves_the_others_as_they_are(on_error, workers):
    reward = supervised(on_error=on_error, workers=workers)
    with pytest.warns(
        UserWarning, match=r"failed on 3 of 6 completions, and .* each of them\. The first is row 1 .*no such thing"
    ):
        result = compute_rewards(reward, texts("1", "raise", "2.5", "nan", "text 7", "-1"))
    assert result.rewards.tolist() == [1.0, 0.0, 2.5, 0.0, 0.0, -1.0]
    assert result.failed[""].errors.tolist() == [False, True, False, True, True, False]
    assert result.failed[""].timeouts.tolist() == [False] * 6
    assert result.abstained.tolist() == [
        on_error == "abstain" and failed for failed in result.failed[""].errors.tolist()
    ]


def test_workers_end_and_hang_and_eat_memory_and_the_others_are_scored_in_order():
    completions = [str(number) for number in range(40)]
    completions[3], completions[11], completions[12], completions[20] = "exit", "hang", "sys.exit", "memory"
    started = time.monotonic()
    with pytest.warns(UserWarning, match="4 of 40 completions"):
        result = compute_rewards(supervised(on_error="zero", workers=2, timeout_seconds=1.0), texts(*completions))
    expected = [0.0 if i in (3, 11, 12, 20) else float(i) for i in range(40)]
    assert result.rewards.tolist() == expected
    assert result.failed[""].timeouts.nonzero()[:, 0].tolist() == [11]
    assert result.failed[""].errors.nonzero()[:, 0].tolist() == [3, 12, 20]
    assert time.monotonic() - started < 120


@pytest.mark.parametrize("completion", ["exit", "sys.exit"])
def test_a_reward_that_ends_the_process_is_an_error_of_the_reward(completion):
    with pytest.raises(RewardError, match=r"the reward by_text called (os\._exit|sys\.exit)\(0\)"):
        compute_rewards(faulty.by_text, texts("1", completion))
    with pytest.warns(UserWarning, match="1 of 2 completions"):
        assert compute_rewards(supervised(on_error="zero"), texts("1", completion)).rewards.tolist() == [1.0, 0.0]


def test_outside_a_reward_a_process_still_ends():
    script = "import os, rlmod.reward._compute\nif os.fork() == 0: os._exit(0)\nos.wait(); os._exit(7)"
    done = subprocess.run([sys.executable, "-c", script], check=False, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 7


def test_stop_names_the_row_and_what_would_go_on():
    with pytest.raises(
        RewardError, match=r"by_text failed on 1 of 2 .* row 1: .*no such thing.*reward\.on_error=abstain"
    ):
        compute_rewards(supervised(on_error="stop", max_failure_share=0.5), texts("1", "raise"))


def test_retry_repeats_only_what_failed(monkeypatch):
    calls = []
    waits = []

    def flaky(rows: Texts) -> list[float]:
        calls.append(list(rows.completions))
        if len(calls) < 4 and "judge" in rows.completions:
            raise ConnectionError("503")
        return [1.0] * len(rows)

    vars(flaky)["pointwise"] = True
    monkeypatch.setattr("rlmod.reward._failures.time.sleep", waits.append)
    with pytest.warns(UserWarning, match=r"1 of 2 completions failed .*503.*attempt 2 in 1 s"):
        result = compute_rewards(Supervised(supervised=flaky, on_error="retry"), texts("fine", "judge"))
    assert result.rewards.tolist() == [1.0, 1.0]
    assert calls == [["fine", "judge"], ["fine"], ["judge"], ["judge"]]
    assert waits == [1.0]
    assert result.failed[""].errors.tolist() == [False, False]


def test_retries_wait_longer_each_time_and_then_stop(monkeypatch):
    waits = []

    def down(rows: Texts) -> list[float]:
        raise ConnectionError("503")

    monkeypatch.setattr("rlmod.reward._failures.time.sleep", waits.append)
    reward = Supervised(supervised=down, on_error="retry", retries=8)
    with pytest.warns(UserWarning, match="attempt 9 in 60 s"), pytest.raises(RewardError, match="503"):
        compute_rewards(reward, texts("a"))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_reward_that_compares_completions_is_repeated_as_a_whole(monkeypatch):
    calls = []

    def relative(rows: Texts) -> list[float]:
        calls.append(len(rows))
        return [1.0, float("nan") if len(calls) == 1 else 1.0, 1.0]

    monkeypatch.setattr("rlmod.reward._failures.time.sleep", lambda _: None)
    with pytest.warns(UserWarning, match="1 of 3"):
        compute_rewards(Supervised(supervised=relative, on_error="retry"), texts("a", "b", "c"))
    assert calls == [3, 3]


def test_a_call_that_takes_too_long_is_left_behind_and_the_run_goes_on():
    with pytest.warns(UserWarning, match=r"2 of 2 completions.*took longer than 0\.2 s"):
        result = compute_rewards(supervised(on_error="abstain", timeout_seconds=0.2), texts("hang", "1"))
    assert result.failed[""].timeouts.tolist() == [True, True]
    assert result.abstained.tolist() == [True, True]


@pytest.mark.parametrize("workers", [None, 1])
def test_terms_that_do_not_count_for_correctness_stay_out_of_the_outcomes(workers):
    reward = Supervised(supervised=faulty.Punished(), on_error="zero", workers=workers)
    result = compute_rewards(reward, texts("1", "abstain"))
    assert result.rewards.tolist() == [0.5, 0.0]
    assert result.outcomes.tolist() == [1.0, 0.0]
    assert result.abstained.tolist() == [False, True]


def test_a_completion_whose_time_is_up_has_no_value():
    with pytest.warns(UserWarning, match="2 of 2"):
        result = compute_rewards(supervised(on_error="zero", timeout_seconds=0.2), texts("hang", "1"))
    assert has_value(result).tolist() == [False, False]
    assert result.abstained.tolist() == [False, False]
    with pytest.raises(RewardError, match=r"failed on 2 of 2 completions of a batch \(2 time-outs\)"):
        check_failure_shares(result._replace(failed={"": result.failed[""]._replace(max_share=0.5)}))


def test_none_is_no_failure():
    result = compute_rewards(faulty.by_text, texts("1", "abstain"))
    assert result.abstained.tolist() == [False, True]
    assert result.failed == {}
    assert failure_metrics([result.failed], result.abstained) == {"failures/abstained": 1.0}
    assert failure_metrics([{}], torch.zeros(2, dtype=torch.bool)) == {}


def test_the_share_of_failures_is_limited_over_a_batch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = compute_rewards(supervised(on_error="zero", max_failure_share=0.5), texts("1", "raise", "raise", "2"))
        check_failure_shares(result)
        result = compute_rewards(supervised(on_error="zero", max_failure_share=0.49), texts("1", "raise", "raise", "2"))
    with pytest.raises(RewardError, match=r"^reward failed on 2 of 4 .*reward\.max_failure_share=0\.49"):
        check_failure_shares(result)


def test_a_term_that_abstains_takes_its_completion_out_and_counts_by_its_name():
    reward = Weighted(
        terms={
            "judge": {"weight": 1.0, "reward": supervised(on_error="abstain")},
            "format": {"weight": 0.5, "reward": ExactMatch(pattern=".*", correct=1.0, incorrect=1.0)},
        }
    )
    with pytest.warns(UserWarning, match="1 of 3"):
        result = compute_rewards(reward, texts("1", "raise", "2"))
    assert result.abstained.tolist() == [False, True, False]
    assert result.rewards.tolist() == [1.5, 0.0, 2.5]
    assert {name: values.tolist() for name, values in result.terms.items()} == {
        "judge": [1.0, 0.0, 2.0],
        "format": [0.5, 0.0, 0.5],
    }
    assert failure_metrics([result.failed], result.abstained) == {
        "failures/judge/timeouts": 0.0,
        "failures/judge/errors": 1.0,
        "failures/abstained": 1.0,
    }


def test_grop_compares_lengths_of_scored_completions_only():
    def base(rows: Texts) -> list[float | None]:
        return [None if text == "?" else 1.0 for text in rows.completions]

    reward = Grop(reward=base, max_tokens=100, buffer=10)
    batch = Texts(completions=["a", "b", "?", "c"], answers=[""] * 4, lengths=[10, 30, 900, 10], group=[0] * 4)
    result = compute_rewards(reward, batch)
    # L = max((10 + 30) / 2, 50 / 3) = 20; the second: -(30 - 20) / 40
    assert result.terms["grop"].tolist() == [0.0, -0.25, 0.0, 0.0]
    assert result.abstained.tolist() == [False, False, True, False]


def test_settings_are_keys_of_any_reward():
    reward = build_reward({"_target_": "tests.reward.faulty.by_text", "on_error": "zero", "retries": 0})
    assert isinstance(reward, Supervised)
    assert reward.on_error == "zero"
    assert build_reward(composed("reward=exact_match").reward) == ExactMatch(pattern=r"#+\s*(.+)")
    wrapped = build_reward(composed("reward=exact_match", "reward.on_error=abstain").reward)
    assert isinstance(wrapped, Supervised)
    assert wrapped.supervised == ExactMatch(pattern=r"#+\s*(.+)")
    inner = build_reward(composed("reward=weighted", "+reward.terms.overlong.reward.on_error=abstain").reward)
    assert isinstance(inner, Weighted)
    assert inner.terms["overlong"]["reward"].on_error == "abstain"
    assert inner.excluded_terms == ("overlong",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.on_error=ignore", r"reward\.on_error must be"),
        ("reward.retries=-1", r"reward\.retries must be at least 0"),
        ("reward.timeout_seconds=0", r"reward\.timeout_seconds must be above 0"),
        ("reward.max_failure_share=2", r"reward\.max_failure_share must be from 0 to 1"),
        ("reward.workers=0", r"reward\.workers must be at least 1"),
        ("reward.workers=many", r"reward\.workers must be"),
    ],
)
@pytest.mark.parametrize("option", ["exact_match", "math_verify"])
def test_wrong_settings_name_their_key(option, override, message):
    with pytest.raises(ValueError, match=message):
        build_reward(composed(f"reward={option}", override).reward)


def test_a_reward_that_no_worker_can_import_says_so():
    with pytest.raises(RewardError, match=r"reward\.workers=1: .*lambda.* define it in a module"):
        compute_rewards(Supervised(supervised=lambda rows: [0.0] * len(rows), workers=1), texts("1"))


def test_a_users_function_in_a_worker_keeps_the_environment(monkeypatch):
    monkeypatch.setenv("RLMOD_TEST_NUMBER", "4")
    reward = Supervised(supervised=faulty.environment, workers=1, timeout_seconds=77.0)
    assert compute_rewards(reward, texts("RLMOD_TEST_NUMBER")).rewards.tolist() == [4.0]


def test_the_time_limit_of_a_completion_does_not_include_the_import_of_the_reward(tmp_path, monkeypatch):
    (tmp_path / "slow_import.py").write_text(
        "import time\ntime.sleep(4)\ndef reward(texts):\n    return [float(text) for text in texts.completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = Supervised(supervised=importlib.import_module("slow_import").reward, workers=1, timeout_seconds=3.5)
    assert compute_rewards(reward, texts("1", "2")).rewards.tolist() == [1.0, 2.0]


def test_named_terms_come_back_from_workers():
    result = compute_rewards(Supervised(supervised=faulty.terms, workers=2), texts("1", "3"))
    assert result.rewards.tolist() == [1.5, 3.5]
    assert result.terms["a"].tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    "reward", [ExactMatch(pattern=r"(?:a|aa)+$"), Format(pattern=r"(?:a|aa|aaa)+b")], ids=["exact_match", "format"]
)
def test_a_pattern_that_takes_exponentially_long_is_stopped(reward, monkeypatch):
    monkeypatch.setattr("rlmod.reward._patterns.SECONDS", 0.2)
    endless = "a" * 200 + "c"
    with pytest.raises(RewardError, match=r"PatternTimeout: the pattern .* took longer"):
        compute_rewards(reward, texts("ab", endless))
    with pytest.warns(UserWarning, match="1 of 2"):
        result = compute_rewards(Supervised(supervised=reward, on_error="zero"), texts("ab", endless))
    assert result.failed[""].timeouts.tolist() == [False, True]


def test_a_wait_is_announced(caplog):
    from rlmod.reward._failures import heartbeat

    with heartbeat("the judge", seconds=0.05):
        time.sleep(0.3)
    assert "waiting for the judge, for 0 s so far" in caplog.text


def test_too_many_calls_that_never_return_stop_the_run():
    script = """
        import warnings
        from rlmod.reward._compute import RewardError, compute_rewards
        from rlmod.reward._supervised import Supervised
        from rlmod.types import Texts
        from tests.reward import faulty
        warnings.simplefilter("ignore")
        reward = Supervised(supervised=faulty.by_text, on_error="zero", timeout_seconds=0.01)
        for number in range(8):
            compute_rewards(reward, Texts(completions=["hang"], answers=[""]))
        result = compute_rewards(reward, Texts(completions=["hang"], answers=[""]))
        print(result.failed)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "8 calls have not returned" in done.stderr
    assert "reward.workers=2" in done.stderr


def test_workers_of_a_reward_that_compares_completions_are_refused():
    grop = Grop(reward=lambda rows: [1.0] * len(rows), max_tokens=100, buffer=10)
    with pytest.raises(ValueError, match=r"reward\.workers=2: Grop compares the completions of a group"):
        Supervised(supervised=grop, workers=2)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"WORLD_SIZE": "8"}, 8),
    ],
)
def test_the_ranks_of_a_machine_share_its_cores(variables, ranks, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert default_workers() == 16 // ranks
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert default_workers() == 1


def test_each_completion_of_a_chunk_has_its_own_time_limit():
    """Eight items for one worker begin with a chunk of four, which takes 2.4 s."""
    pool = Pool(PoolSettings("time:sleep", 1, 2.0, 2.0, False))
    replies = pool.map([(0.6,)] * 4 + [(0.0,)] * 4, "the test")
    assert [reply.status for reply in replies] == ["ok"] * 8
    pool.stop()


def test_a_worker_that_died_while_it_had_nothing_to_do_is_replaced():
    pool = Pool(PoolSettings("os:getpid", 1, 60.0, 2.0, False))
    (first,) = pool.map([()], "the test")
    os.kill(first.value, signal.SIGKILL)
    while ") Z" not in Path(f"/proc/{first.value}/stat").read_text():
        time.sleep(0.01)
    (second,) = pool.map([()], "the test")
    assert second.status == "ok"
    assert second.value != first.value
    pool.stop()


def test_a_server_that_dies_while_its_worker_hangs_is_replaced():
    pool = Pool(PoolSettings("tests.reward.faulty:hang_once", 1, 120.0, 2.0, False))
    flag = Path(tempfile.mkdtemp()) / "flag"

    def kill_when_hanging() -> None:
        while not flag.exists():
            time.sleep(0.05)
        assert pool.process is not None
        os.kill(pool.process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_hanging)
    killer.start()
    started = time.monotonic()
    assert [reply.value for reply in pool.map([(str(flag),)], "the test")] == [7.0]
    assert time.monotonic() - started < 100  # not the worker's own clock
    killer.join()
    pool.stop()
