"""Problems in a file equal those in a list."""

from decimal import Decimal
from types import MappingProxyType

import numpy as np
import pytest

from rlmod.data import _cache, _store
from rlmod.data._store import ProblemStore, answers_of, collect, sources_of
from rlmod.types import Problem

OTHER = next(iter(_store.OTHER_FIELDS))
"""The field with the data of a problem beyond prompt, answer and source."""


@pytest.fixture(autouse=True)
def small_limits(tmp_path, monkeypatch):
    monkeypatch.setenv(_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(_cache, "LARGE", 20)
    monkeypatch.setattr(_store, "BATCH_ROWS", 7)
    monkeypatch.setattr(_store, "FORGET_BATCHES", 2)


def problems(number: int) -> list[Problem]:
    chat = ({"role": "system", "content": "é"}, {"role": "user", "content": "1+1"})
    more = {
        "name": "x",
        "none": None,
        "nested": {"numbers": [1, 2.5, True], "pair": (1, "a")},
        "exact": Decimal("0.10"),
    }
    more |= {"bytes": b"\x00\xff", "half": np.float32(0.1)}
    return [
        Problem(
            prompt=chat if i % 3 == 0 else f"{i} + 🙂\n",
            answer=("1", "eins") if i % 4 == 0 else str(i),
            source=f"train.jsonl:{i}",
            **({OTHER: more} if i % 5 == 0 else {}),
        )
        for i in range(number)
    ]


def in_file(these: list[Problem]) -> ProblemStore:
    store = collect(iter(these))
    assert isinstance(store, ProblemStore)
    return store


def test_few_problems_stay_in_a_list():
    assert collect(iter(problems(20))) == problems(20)
    assert isinstance(collect(iter(problems(20))), list)


@pytest.mark.parametrize("number", [21, 28, 100])
def test_many_problems_are_read_back_as_they_were(number):
    expected, store = problems(number), collect(iter(problems(number)))
    assert isinstance(store, ProblemStore)
    assert len(store) == number
    assert list(store) == expected
    assert [store[i] for i in range(-number, number)] == expected * 2
    assert store[3:30:2] == expected[3:30:2]
    assert store == expected
    assert store != expected[:-1]
    with pytest.raises(IndexError):
        store[number]
    with pytest.raises(IndexError):
        store[-number - 1]


def test_types_survive():
    value = getattr(collect(problems(30))[5], OTHER)
    assert type(value["exact"]) is Decimal
    assert type(value["nested"]["pair"]) is tuple
    assert type(value["half"]) is np.float32
    assert [type(one) for one in value["nested"]["numbers"]] == [int, float, bool]


def test_a_selection_is_read_from_the_same_file():
    store, expected = in_file(problems(100)), problems(100)
    rows = [0, 3, 6, 7, 50, 99]
    chosen = store.select(rows)
    assert list(chosen) == [chosen[i] for i in range(6)] == [expected[i] for i in rows]
    again = chosen.select([1, 4])
    assert list(again) == [expected[3], expected[50]]
    assert [a for part in answers_of(again) for a in part] == [p.answer for p in again]
    assert len({store.digest, chosen.digest, again.digest}) == 3
    assert again.digest == in_file(problems(100)).select([3, 50]).digest


def test_columns_are_read_in_parts():
    expected = problems(100)
    store = in_file(expected[:])
    for values, name in ((answers_of, "answer"), (sources_of, "source")):
        parts = list(values(store))
        assert len(parts) == 15
        assert [v for part in parts for v in part] == [getattr(p, name) for p in expected]
        assert list(values(expected)) == [[getattr(p, name) for p in expected]]


@pytest.mark.parametrize("value", [object(), {1: "a"}, {"__rlmod__": "tuple"}, 1j, {"x"}, "\ud800"])
@pytest.mark.parametrize("place", [0, 19, 60])
def test_a_value_that_a_file_cannot_hold_keeps_all_problems_in_memory(value, place, caplog):
    expected = problems(100)
    expected[place] = Problem(prompt="?", answer="1", source="odd", **{OTHER: {"value": value}})
    assert collect(iter(expected)) == expected
    assert "odd: the problem cannot be kept in a file" in caplog.text


def test_other_mappings_are_read_back_as_dictionaries():
    odd = Problem(prompt="?", answer="1", source="s", **{OTHER: MappingProxyType({"a": 1})})
    assert getattr(collect([odd] * 30)[29], OTHER) == {"a": 1}


def test_equal_problems_have_the_same_hash_and_others_another():
    one, same = in_file(problems(40)), in_file(problems(40))
    other = problems(40)
    other[39] = Problem(prompt="other", answer="1", source="s")
    assert one.digest == same.digest != in_file(other).digest


def test_the_file_ends_with_the_problems(tmp_path):
    store = in_file(problems(40))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    del store
    assert not list((tmp_path / "cache").iterdir())
