import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from rlmod.reward import _pool
from rlmod.reward._math_grader import _parse_gold
from rlmod.reward.math_verify import MathVerify
from rlmod.types import Problem, Texts
from tests.command_line import SHORT, refused, refused_eval, run_eval
from tests.real import real

REPOSITORY = Path(__file__).parents[2]
ENDLESS = "\\boxed{9^{9^{9^{9}}}}"  # verify evaluates it, in one C routine that no signal handler of Python interrupts


def rewards(completions, answers, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no row may have failed
        return MathVerify(**fields)(Texts(completions=completions, answers=answers))


def alive(pid):
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True
    ).stdout.strip()
    return state != "" and not state.startswith("Z")


@pytest.fixture(scope="module")
def gsm8k():
    solutions = [json.loads(line)["answer"] for line in real("gsm8k/test.jsonl").read_text().splitlines()]
    gold = [solution.rsplit("####", 1)[1].strip() for solution in solutions]
    assert len(gold) == 1319
    return solutions, gold, [str(int(number.replace(",", "")) + 1) for number in gold]


@pytest.mark.parametrize("form", ["number", "solution", "box", "sentence"])
def test_all_of_gsm8k_scores_1_against_itself_and_0_against_one_more(gsm8k, form):
    solutions, gold, one_more = gsm8k
    completions = {
        "number": gold,
        "solution": solutions,
        "box": [f"So it is $\\boxed{{{number}}}$." for number in gold],
        "sentence": [solution.replace("####", "The answer to all 3 questions is $") for solution in solutions],
    }[form]
    assert rewards(completions, gold) == [1.0] * 1319
    assert rewards(completions, one_more) == [0.0] * 1319


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("costs $1,234.", "1234"),
        ("costs \\$1,234.", "1,234"),
        ("a loss, so -$5", "-5"),
        ("a loss, so \u22125", "-5"),
        ("Total:18", "18"),
        ("eighteen (18).", "18"),
        ("**$18**", "18"),
        ("####18", "18"),
        ("#### 18\n\nQuestion: what is 5?", "18"),
        ("#### Step 3\nSo it is 12", "12"),
        ("To find the answer, add 5 and 3 to get 8", "8"),
        ("It is 8\n- 3 eggs", "3"),
        ("It is 8\n-3", "-3"),
        ("\\boxed{1}, no: \\boxed{2}. That took 3 lines", "2"),
        ("\\boxed{50\\%}", "50"),
        ("50%", "0.5"),
        ("18.00", "18"),
        ("0.75", "\\frac{3}{4}"),
        ("it is $\\frac{3}{4}$ of it", "3/4"),
        ("\\[ x = \\frac{1}{2} \\]", "\\frac12"),
        ("\\boxed{\\sqrt{2}/2}", "$\\frac{1}{\\sqrt{2}}$"),
        ("\\boxed{x^2+2x+1}", "(x+1)^2"),
        ("\\boxed{18\\text{ dollars}}", "18"),
        ("1" * 5000, "1" * 5000),
    ],
)
def test_what_is_read_as_the_answer(completion, answer):
    assert rewards([completion], [answer]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("5 eggs, then 6", "5"),
        ("It is 8\n- 3", "5"),  # 8 - 3
        ("\\boxed{1} or \\boxed{2}", "1"),
        ("\\boxed{2} is not 3", "3"),
        ("The answer is 5. No, 7.", "5"),
        ("5", "-5"),
        ("12.34", "1234"),
        ("", "1"),
        ("no idea", "1"),
        ("\\boxed{18", "18"),
    ],
)
def test_what_is_wrong(completion, answer):
    assert rewards([completion], [answer]) == [0.0]


def servers():
    return {pool.process.pid: pool for pool in _pool._pools.values() if pool.process is not None}


def children(pid):
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], check=False, capture_output=True, text=True
    ).stdout
    return [int(line) for line in listed.split()]


def test_a_row_that_hangs_is_killed_and_counted_and_the_others_keep_their_rewards():
    reward = MathVerify(timeout_seconds=0.5, workers=1)
    texts = Texts(completions=["1", ENDLESS, "2", ENDLESS, "4"], answers=["1", "1", "2", "7", "5"])
    reward(Texts(completions=["1"], answers=["1"]))
    server = next(pid for pid, pool in servers().items() if pool.settings.seconds == 0.5)
    (before,) = children(server)
    start = time.monotonic()
    with pytest.warns(
        UserWarning,
        match=r"failed on 2 of 5 completions, and gives reward 0 to each of them.* row 1 \(it took longer than 0\.5 s\)",
    ) as shown:
        result = reward(texts).result
    assert len(shown) == 1
    assert result.rewards.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert result.failed[""].timeouts.tolist() == [False, True, False, True, False]
    assert not result.failed[""].errors.any()
    assert not result.abstained.any()
    assert time.monotonic() - start > 1.0
    assert not alive(before)  # waited for: no zombie


def test_an_idle_worker_that_dies_is_replaced():
    reward = MathVerify(timeout_seconds=60.0, workers=1)
    assert reward(Texts(completions=["1"], answers=["1"])) == [1.0]
    server = next(pid for pid, pool in servers().items() if pool.settings.seconds == 60.0)
    (worker,) = children(server)
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert reward(Texts(completions=["1", "2"], answers=["1", "2"])) == [1.0, 1.0]
    assert next(pid for pid, pool in servers().items() if pool.settings.seconds == 60.0) == server


def test_a_server_that_dies_is_replaced_and_nothing_is_lost(caplog):
    reward = MathVerify(timeout_seconds=61.0, workers=1)
    reward(Texts(completions=["1"], answers=["1"]))
    server = next(pid for pid, pool in servers().items() if pool.settings.seconds == 61.0)
    os.kill(server, signal.SIGKILL)
    time.sleep(0.1)
    assert reward(Texts(completions=["1", "2"], answers=["1", "2"])) == [1.0, 1.0]


def test_an_error_while_comparing_is_told_from_a_wrong_answer(monkeypatch):
    from rlmod.reward import _math_grader

    def broken(*args, **kwargs):
        raise TypeError

    assert _math_grader.grade("1", ["1"]) == ("correct", "")
    assert _math_grader.grade("1", ["2", "1"]) == ("correct", "")
    assert _math_grader.grade("1", ["2", "3"]) == ("incorrect", "")
    monkeypatch.setattr(_math_grader, "verify", broken)
    assert _math_grader.grade("1", ["1"]) == ("error", "TypeError")


def test_one_server_serves_all_rows_and_calls():
    rewards(["1", "2"], ["1", "2"])
    before = set(servers())
    rewards(["3"], ["3"])
    assert set(servers()) == before


@pytest.mark.parametrize("answer", ["", "\\frac{", "$$"])
def test_an_answer_that_cannot_be_read_is_named_with_its_source(answer, caplog):
    good, bad = (Problem(prompt="?", answer=a, source=f"train.jsonl:{line}") for line, a in ((11, "1"), (12, answer)))
    texts = Texts(completions=["1", "1"], answers=["1", answer], problems=[good, bad])
    result = MathVerify()(texts).result  # nobody has called prepare: a recorded completion, for example
    assert result.abstained.tolist() == [False, True]
    assert result.rewards.tolist() == [1.0, 0.0]
    assert repr(answer) in caplog.text
    assert "train.jsonl:12" in caplog.text
    assert list(MathVerify().find_unreadable([good, bad, good, replace(bad, answer=("2", answer))])) == [1, 3]
    assert repr(answer) in MathVerify().find_unreadable([good, bad])[1]
    assert MathVerify().find_unreadable([good]) == {}


NUMBERS = [
    "7",
    "-1,234",
    "$5",
    "-$5.50",
    "+.5",
    "5.",
    "50%",
    "50 %",
    "1e-7",
    "1.5E+300",
    "9" * 400,
    "so\n#### 18",
    r"\boxed{1\,234}",
]


def test_plain_numbers_are_readable_without_a_worker(monkeypatch):
    assert all(_parse_gold(number) for number in NUMBERS)
    problems = [Problem(prompt="?", answer=number, source="a:1") for number in [*NUMBERS, ("1", "2")]]
    monkeypatch.setattr(MathVerify, "_score", lambda self, items: [] if not items else pytest.fail(str(items)))
    assert MathVerify().find_unreadable(problems) == {}


def write_problems(folder: Path, *answers: str) -> list[str]:
    file = folder / "problems.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"{i}+1:", "answer": each}) + "\n" for i, each in enumerate(answers, 1))
    )
    return [f"data.path={file}", f"data.validation_path={file}", "data=problem_file"]


def test_unreadable_answers_end_a_run_that_names_them(tmp_path, monkeypatch):
    words = write_problems(tmp_path, "1", "3", r"\frac{", "$$", r"\frac{", r"\frac{", "2")
    message = refused(
        monkeypatch, tmp_path, "debug=short", SHORT[-1], *words, "reward=weighted", "reward@verifier=math_verify"
    )
    assert "4 of 7 answers cannot be read by the reward" in message
    assert f"{tmp_path}/problems.jsonl:3: '\\\\frac{{'" in message
    assert "data.unreadable_answer=drop" in message


def test_unreadable_answers_are_dropped_counted_and_said_once(tmp_path, monkeypatch, capsys):
    words = write_problems(tmp_path, "1", r"\frac{", "$$", "2")
    out = tmp_path / "out"
    given = ("policy=tiny", f"output={out}", "data.unreadable_answer=drop", "sampler.max_new_tokens=32")
    run_eval(monkeypatch, *given, *words, "reward=weighted", "reward@verifier=math_verify")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["problems"], summary["dropped_problems"]) == (2, 2)
    assert capsys.readouterr().out.count("2 of 4 answers cannot be read by the reward") == 1
    message = refused_eval(
        monkeypatch, *given, *words, "reward=weighted", "reward@verifier=math_verify", "data.unreadable_answer=skip"
    )
    assert "data.unreadable_answer must be one of error, drop" in message


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_the_time_out_has_to_be_a_time(seconds):
    with pytest.raises(ValueError, match=r"reward\.timeout_seconds must be above 0"):
        MathVerify(timeout_seconds=seconds)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_trainer(ending):
    """Ctrl-C, which the terminal sends to the whole process group, and a trainer that cannot clean up."""
    script = """
        import signal
        from rlmod.reward import _pool, math_verify
        from rlmod.types import Texts
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job, and inherited so
        reward = math_verify.MathVerify(timeout_seconds=2)
        reward(Texts(completions=["1"], answers=["1"]))
        print(next(iter(_pool._pools.values())).process.pid, flush=True)
        reward(Texts(completions=[%r], answers=["1"]))
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script) % ENDLESS],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    server = int(trainer.stdout.readline())
    pool = [server, *children(server)]
    assert len(pool) > 1
    assert all(alive(each) for each in pool)
    assert os.getpgid(server) != os.getpgid(trainer.pid)  # Ctrl-C does not reach it
    time.sleep(0.5)  # into the row that hangs
    os.killpg(trainer.pid, ending)
    _, errors = trainer.communicate(timeout=60)
    assert trainer.returncode == -ending
    assert errors.count("Traceback") == (1 if ending == signal.SIGINT else 0)  # the trainer's own
    assert "_pool_server.py" not in errors
    deadline = time.monotonic() + 30
    while any(alive(each) for each in pool) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(each) for each in pool)


def test_neither_side_imports_more_than_it_needs():
    script = """
        import sys
        import rlmod.reward._math_grader, rlmod.reward._pool_server
        assert "math_verify" in sys.modules and not {"torch", "numpy", "hydra"} & set(sys.modules)
        for name in [name for name in sys.modules if name.startswith("math_verify")]:
            del sys.modules[name]
        import rlmod.reward.math_verify
        assert not {"math_verify", "transformers", "pytorch_lightning", "lightning"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("gold", "completion", "reward"),
    [
        # Spellings of a box and of what stands in it.
        ("8", r"so \boxed {8} after 3 steps.", 1.0),
        ("8", r"\fbox{8} in 3 steps", 1.0),
        ("8", r"The answer is \boxed8 after 3 steps", 1.0),
        ("8", "\\boxed\n{8}, not 3", 1.0),
        ("8", r"\framebox{8}, not 9", 1.0),
        ("1234", r"\boxed{1\,234}", 1.0),
        ("12345678", r"\boxed{12{,}345{,}678}", 1.0),
        ("8", r"\boxed{\text{Answer: }8}", 1.0),
        ("8", r"\boxed{\text{The final answer is } 8}", 1.0),
        (r"\frac12", r"\boxed{\displaystyle\dfrac{1}{2}}", 1.0),
        # A box that is cut off withdraws an earlier one.
        ("4", r"\boxed{4}. Wait, check again. So the answer is \boxed{", 0.0),
        ("4", r"\boxed{4}. No, it is \boxed{7", 0.0),
        ("4", r"\boxed{4}. No, it is \boxed", 0.0),
        ("4", r"First \boxed{3}, then \boxed{4}", 1.0),
        # Numbers whose first six decimals are equal.
        (r"\frac{1}{2004!}", r"\boxed{\frac{1}{2006!}}", 0.0),
        (r"\frac{1}{2^{99}}", r"\boxed{\frac{1}{2^{98}}}", 0.0),
        (r"\frac{1}{2^{99}}", r"\boxed{2^{-99}}", 1.0),
        (r"(\frac{1}{2004!}, 1)", r"\boxed{(\frac{1}{2006!}, 1)}", 0.0),
        (r"(\frac{1}{2004!}, 1)", r"\boxed{(\frac{1}{2004!}, 1)}", 1.0),
        (r"\{\frac{1}{2^{99}}, 2\}", r"\boxed{\{2, 2^{-98}\}}", 0.0),
        ("0", r"\boxed{10^{-9}}", 0.0),
        ("1/30", r"\boxed{0.033333}", 1.0),
        ("1/30", r"\boxed{0.0333}", 0.0),
        # Scientific notation, as Python and JSON write small numbers.
        ("1e-07", r"\boxed{10^{-7}}", 1.0),
        ("0.0000001", r"\boxed{1e-7}", 1.0),
        ("1.5e3", r"\boxed{1500}", 1.0),
        ("1.5E+3", "#### 1500", 1.0),
    ],
)
def test_a_value_is_compared_however_it_is_written(gold, completion, reward):
    assert rewards([completion], [gold]) == [reward]


def test_a_gold_answer_whose_box_is_cut_off_cannot_be_parsed():
    assert MathVerify()(Texts(completions=["4"], answers=[r"\boxed{4"])) == [None]
