"""Many problems: the same results from files as from memory, and nothing out of date is taken from the cache."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import rlmod
from rlmod import RLData
from rlmod.data import _cache, _store
from rlmod.data._large import load_problems
from rlmod.data.hub_dataset import HubDataset
from rlmod.data.problem_file import ProblemFile
from rlmod.rollout import stored_rows, token_rows
from rlmod.rollout.prompts import EncodedProblems, PromptEncoder
from rlmod.rollout.token_rows import TokenRows
from rlmod.types import Problem

TINY = Path(rlmod.__file__).parent / "model" / "policies" / "tiny"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if mood %}!{% endif %}="


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Many problems are 20 or more. Return what was converted and tokenized: the classes' names."""
    monkeypatch.setenv(_cache.VARIABLE, str(tmp_path / "cache"))
    for module, name, value in (
        (_cache, "LARGE", 20),
        (_store, "BATCH_ROWS", 7),
        (stored_rows, "PART_PROBLEMS", 6),
        (token_rows, "SCAN", 50),
    ):
        monkeypatch.setattr(module, name, value)
    made: list[str] = []

    def count(owner, method):
        original = getattr(owner, method)

        def counted(self, *arguments):
            if owner.__name__ not in made:
                made.append(owner.__name__)
            return original(self, *arguments)

        monkeypatch.setattr(owner, method, counted)

    for owner, method in ((ProblemFile, "__call__"), (HubDataset, "__call__"), (PromptEncoder, "_encode_part")):
        count(owner, method)
    return made


def write(path: Path, number: int = 60, first: str = "1") -> Path:
    """Write problems, of which every third is a chat."""
    lines = [
        {"prompt": [{"role": "user", "content": f"{i}+1"}] if i % 3 == 0 else f"{i}+{i}=", "answer": [str(i), "x"]}
        for i in range(1, number + 1)
    ]
    lines[0] = {"prompt": f"{first}+1=", "answer": "2"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def start(component, tokenizer, encoder: PromptEncoder | None = None) -> EncodedProblems:
    return (encoder or PromptEncoder()).encode(load_problems(component), tokenizer)


def same(one: EncodedProblems, other: EncodedProblems) -> bool:
    batches = [each.batch(range(len(each))) for each in (one, other)]
    assert torch.equal(batches[0].ids, batches[1].ids)
    assert torch.equal(batches[0].mask, batches[1].mask)
    return one.problems == other.problems and one.ids == other.ids and one.dropped == other.dropped


def in_memory(component, tokenizer, encoder: PromptEncoder | None = None) -> EncodedProblems:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cache, "LARGE", 10**9)
        encoded = start(component, tokenizer, encoder)
    return replace(encoded, problems=list(encoded.problems))


@pytest.mark.parametrize(
    "encoder", [PromptEncoder(), PromptEncoder(chat=True, system="s"), PromptEncoder(max_tokens=5)]
)
def test_files_and_memory_hold_the_same(encoder, tokenizer, calls, tmp_path):
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    expected = in_memory(component, tokenizer, encoder)
    calls.clear()
    first = start(component, tokenizer, encoder)
    assert calls == ["ProblemFile", "PromptEncoder"]
    assert same(expected, first)
    assert isinstance(first.problems, _store.ProblemStore)
    assert first.rows.flat.dtype == "int32"
    calls.clear()
    second = start(component, tokenizer, encoder)
    assert not calls
    assert same(expected, second)
    assert second.dropped == {5: 34}.get(encoder.max_tokens, 0)


@pytest.mark.parametrize("off", ["", "file/cache"])
def test_without_a_cache_the_same_comes_out(off, tokenizer, calls, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv(_cache.VARIABLE, off and str(tmp_path / off))
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    for _ in range(2):
        calls.clear()
        assert same(in_memory(component, tokenizer), start(component, tokenizer))
        assert calls == ["ProblemFile", "PromptEncoder"]
    assert ("cannot be written" in caplog.text) == bool(off)


def test_a_changed_file_is_read_anew_even_with_the_size_and_time_of_before(tokenizer, calls, tmp_path):
    path = write(tmp_path / "a.jsonl")
    before, times = start(ProblemFile(path=path), tokenizer), path.stat()
    write(path, first="2")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    calls.clear()
    after = start(ProblemFile(path=path), tokenizer)
    assert calls == ["ProblemFile", "PromptEncoder"]
    assert [each.problems[0].prompt for each in (before, after)] == ["1+1=", "2+1="]
    assert before.ids[0] != after.ids[0]


@pytest.mark.parametrize(
    "change",
    [{"answer_field": "answer.0"}, {"skip": 1}, {"limit": 30}, {"template": "{prompt.0.content}"}, {"path": "b.jsonl"}],
)
def test_another_setting_of_the_data_is_converted_anew(change, tokenizer, calls, tmp_path):
    lines = [{"prompt": [{"role": "user", "content": f"{i}"}], "answer": [str(i)]} for i in range(60)]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    component = ProblemFile(path=tmp_path / "a.jsonl")
    start(component, tokenizer)
    calls.clear()
    changed = replace(component, **{k: tmp_path / v if k == "path" else v for k, v in change.items()})
    assert same(start(changed, tokenizer), in_memory(changed, tokenizer))
    assert "ProblemFile" in calls


@pytest.mark.parametrize("change", [{"system": "s"}, {"template_arguments": {"mood": 1}}])
def test_another_setting_of_the_encoder_tokenizes_anew(change, tokenizer, calls, tmp_path):
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    before = start(component, tokenizer)
    calls.clear()
    after = start(component, tokenizer, PromptEncoder(**change))
    assert calls == ["PromptEncoder"]
    assert before.ids != after.ids


def add_a_token(tokenizer):
    tokenizer.add_tokens(["+1"])


def change_the_template(tokenizer):
    tokenizer.chat_template = TEMPLATE + "#"


def lower_case(tokenizer):
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("+", "-")


@pytest.mark.parametrize("change", [add_a_token, change_the_template, lower_case])
def test_another_tokenizer_tokenizes_anew(change, tokenizer, calls, tmp_path):
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    before = start(component, tokenizer)
    calls.clear()
    change(tokenizer)
    after = start(component, tokenizer)
    assert calls == ["PromptEncoder"]
    assert before.ids != after.ids


def test_a_pattern_is_cached_by_the_names_and_contents_of_its_files(tokenizer, calls, tmp_path):
    (tmp_path / "x").mkdir()
    write(tmp_path / "x" / "a.jsonl", 40)
    write(tmp_path / "x" / "b.jsonl", 40, first="7")
    component = ProblemFile(path=f"{tmp_path}/x/*.jsonl")
    assert same(start(component, tokenizer), in_memory(component, tokenizer))
    calls.clear()
    start(component, tokenizer)
    assert calls == []
    (tmp_path / "x" / "b.jsonl").rename(tmp_path / "x" / "c.jsonl")
    renamed = start(component, tokenizer)
    assert "ProblemFile" in calls
    assert renamed.problems[-1].source.endswith("c.jsonl:40")


def test_a_mixture_of_large_files_lives_in_a_file(tokenizer, calls, tmp_path):
    paths = [str(write(tmp_path / f"{name}.jsonl", 40)) for name in "ab"]
    component = ProblemFile(path=[{"path": path, "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)])
    mixed = start(component, tokenizer)
    assert isinstance(mixed.problems, _store.ProblemStore)
    assert len(mixed) == 160
    assert same(mixed, in_memory(component, tokenizer))
    calls.clear()
    assert same(start(component, tokenizer), mixed)
    assert calls == []


def test_a_long_limit_needs_no_new_tokens(tokenizer, calls, tmp_path):
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    start(component, tokenizer)
    calls.clear()
    assert start(component, tokenizer, PromptEncoder(max_tokens=5)).dropped == 34
    assert not calls


def test_padding_and_truncation_of_other_calls_do_not_count(tokenizer, calls, tmp_path):
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    start(component, tokenizer)
    tokenizer(["1", "22"], padding=True, truncation=True, max_length=1)
    calls.clear()
    start(component, tokenizer)
    assert not calls


def test_another_version_of_the_code_or_of_a_library_makes_the_files_anew(tokenizer, calls, tmp_path, monkeypatch):
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    start(component, tokenizer)
    for name, value in (("_version", lambda _: "0.0"), ("hash_file", lambda path: path.name)):
        _cache.hash_code.cache_clear()
        monkeypatch.setattr(_cache, name, value)
        calls.clear()
        start(component, tokenizer)
        assert calls == ["ProblemFile", "PromptEncoder"]
    _cache.hash_code.cache_clear()


def test_a_template_that_reads_the_date_is_good_for_a_day(tokenizer, calls, tmp_path, monkeypatch):
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + TEMPLATE
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    for day, expected in ((1, ["PromptEncoder"]), (1, []), (2, ["PromptEncoder"])):
        today = SimpleNamespace(today=lambda day=day: SimpleNamespace(isoformat=lambda: str(day)))
        monkeypatch.setattr(stored_rows, "datetime", SimpleNamespace(date=today))
        calls.clear()
        start(component, tokenizer)
        assert [call for call in calls if call != "ProblemFile"] == expected


def test_a_tokenizer_or_encoder_with_code_of_its_own_is_not_cached(tokenizer, calls, tmp_path):
    class Own(PreTrainedTokenizerFast):
        pass

    class OwnEncoder(PromptEncoder):
        pass

    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    own = Own.from_pretrained(TINY, chat_template=TEMPLATE)
    for policy, encoder in ((own, PromptEncoder()), (tokenizer, OwnEncoder())):
        for _ in range(2):
            calls.clear()
            assert same(start(component, policy, encoder), in_memory(component, tokenizer))
            assert "PromptEncoder" in calls
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_a_component_of_ones_own_is_called_at_each_start_and_its_tokens_are_found_by_its_prompts(tokenizer, calls):
    def component():
        return [Problem(prompt=f"{i}+{shift}", answer="1", source="own") for i in range(40)]

    for shift, expected in ((1, ["PromptEncoder"]), (1, []), (2, ["PromptEncoder"]), (1, [])):
        calls.clear()
        encoded = start(component, tokenizer, PromptEncoder(chat=False))
        assert calls == expected
        assert tokenizer.decode(encoded.ids[39]) == f"39+{shift}"


def test_a_large_file_of_few_problems_is_read_by_each_rank(tokenizer, calls, tmp_path, monkeypatch):
    line = json.dumps({"prompt": "1" * 500, "answer": "1"})
    path = tmp_path / "a.jsonl"
    path.write_text((line + "\n") * 3, encoding="utf-8")
    assert len(load_problems(ProblemFile(path=path))) == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert len(load_problems(ProblemFile(path=path), 0.2)) == 3


def test_another_rank_maps_the_files_of_rank_0(tokenizer, calls, tmp_path, monkeypatch):
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"rank 0 of this node has not written .*problems-"):
        load_problems(component, 0.2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    problems = load_problems(component)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"rank 0 of this node has not written .*tokens-"):
        PromptEncoder().encode(problems, tokenizer, 0.2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    first = start(component, tokenizer)
    monkeypatch.setenv("LOCAL_RANK", "1")
    calls.clear()
    assert same(first, start(component, tokenizer))
    assert not calls


def test_a_data_set_of_the_hub_library(tokenizer, calls, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "saved"
    for shift, made in ((1, True), (1, False), (2, True)):
        rows = [{"prompt": f"{i}+{shift}", "answer": "1"} for i in range(60)]
        if made:
            datasets.Dataset.from_list(rows).save_to_disk(str(folder))
        calls.clear()
        encoded = start(HubDataset(name=str(folder)), tokenizer)
        assert calls == (["HubDataset", "PromptEncoder"] if made else [])
        assert encoded.problems[59].prompt == f"59+{shift}"


def test_checks_of_stored_rows_find_what_those_in_memory_find(tokenizer, calls, tmp_path):
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))
    stored, plain = start(component, tokenizer), in_memory(component, tokenizer)
    sampler = SimpleNamespace(max_model_len=10, max_new_tokens=6)
    checks = (
        lambda each: each.check_token_ids(20),
        lambda each: each.check_max_model_len(sampler, "sampler"),
        lambda each: each.check_endings("1", tokenizer, "reward.completion_prefix"),
        lambda each: each.without_unreadable({3: "why", 50: "why"}, "error"),
        lambda each: PromptEncoder(max_tokens=5, too_long="error").encode(each.problems, tokenizer),
        lambda each: PromptEncoder(max_tokens=1).encode(each.problems, tokenizer),
    )
    for check in checks:
        with pytest.raises(ValueError, match=r".") as expected:
            check(plain)
        with pytest.raises(ValueError, match=r".") as found:
            check(stored)
        assert str(found.value) == str(expected.value)
    for each in (stored, plain):
        each.check_token_ids(len(tokenizer))
        each.check_endings("=", tokenizer, "reward.completion_prefix")
    dropped = [each.without_unreadable({3: "why", 50: "why"}, "drop") for each in (stored, plain)]
    assert same(*dropped)
    assert len(dropped[0]) == 58


def test_a_prompt_with_an_odd_end_is_found_among_many_that_end_alike(tokenizer, calls):
    prompts = [f"{i}+1=\n" for i in range(60)]
    prompts[47] = "47+1= "  # white space after the text does not count
    encoded = PromptEncoder(chat=False).encode([Problem(prompt=p, answer="1", source=p) for p in prompts], tokenizer)
    encoded.check_endings("1=", tokenizer, "key")
    for odd in ("=", "53+2="):
        prompts[53] = odd
        encoded = PromptEncoder(chat=False).encode(
            [Problem(prompt=p, answer="1", source=p) for p in prompts], tokenizer
        )
        message = rf"key='1=' must be the end of every prompt, but that of {re.escape(odd)} ends in '{re.escape(odd)}'"
        with pytest.raises(ValueError, match=message):
            encoded.check_endings("1=", tokenizer, "key")


def test_a_resumed_run_gets_the_same_prompts(tokenizer, calls, tmp_path):
    component = ProblemFile(path=write(tmp_path / "a.jsonl"))

    def data(encoded) -> RLData:
        made = RLData(train=encoded)
        made.trainer = SimpleNamespace(world_size=1, global_rank=0, lightning_module=SimpleNamespace(seed=3))  # pyright: ignore
        return made

    def prompts(data, number):
        batch = data.next_prompts(number)
        return [problem.source for problem in batch.problems], batch.ids.tolist()

    expected = data(in_memory(component, tokenizer))
    first = data(start(component, tokenizer))
    assert prompts(first, 50) == prompts(expected, 50)
    state = first.state_dict()
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    resumed = data(start(component, tokenizer))
    resumed.load_state_dict(state)
    assert prompts(resumed, 50) == prompts(expected, 50) == prompts(first, 50)


def resident(folder: Path) -> int:
    """Return the KiB of this process's memory that are mapped files of a folder."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_prompts_that_were_handed_out_leave_no_mapped_pages(tokenizer, calls, tmp_path):
    encoded = start(ProblemFile(path=write(tmp_path / "a.jsonl")), tokenizer)
    _ = encoded.problems[3], encoded.rows.array(3).sum()
    assert resident(tmp_path / "cache") > 0
    first = encoded.batch([5, 50, 7])
    assert resident(tmp_path / "cache") == 0
    assert torch.equal(first.ids, encoded.batch([5, 50, 7]).ids)


def test_token_rows_are_a_sequence_of_tuples():
    rows = TokenRows.of([(1, 2), [3], (4, 5, 6)])
    assert rows == ((1, 2), (3,), (4, 5, 6))
    assert rows != ((1, 2), (3,))
    assert rows[-1] == (4, 5, 6)
    assert rows[1:] == [(3,), (4, 5, 6)]
    assert rows.highest == 6
    assert rows.select([0, 2]).tails(2) == [[1, 2], [5, 6]]
    assert TokenRows.of([]).highest == -1
    with pytest.raises(IndexError):
        rows[3]
