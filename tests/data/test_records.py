from decimal import Decimal

import numpy as np
import pytest

from rlmod.data._records import Conversion
from rlmod.reward.exact_match import ExactMatch
from rlmod.reward.math_verify import MathVerify
from rlmod.types import Problem, Texts

CHAT = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1=?"}]
REPLY = {"role": "assistant", "content": "It is 2.\n#### 2"}
NO_FIELD = {"answer_field": None}
DEFAULTS = dict(prompt_field="prompt", answer_field="answer", template=None, answer_pattern=None, limit=None, skip=0)


def problem(record: object, **fields: object) -> Problem:
    return Conversion(**DEFAULTS | fields)([("f:1", record)], "f")[0]


def test_dotted_fields_lead_into_objects_and_lists():
    record = {"a.b": "literal", "q": {"text": ["no", "yes"]}, "r": {"truth": 3}}
    fields = {"prompt_field": "q.text.1", "answer_field": "r.truth"}
    assert problem(record, **fields) == Problem(prompt="yes", answer="3", source="f:1", extra=record)
    assert problem(record, **fields | {"prompt_field": "a.b"}).prompt == "literal"


def test_template():
    record = {"body": "Set {x} and {", "n": 3.0, "extra": {"q": "How many?"}, "answer": 1}
    template = "{body}: {n} {extra.q} {n:.2f} Use \\boxed{{}}.\n"
    expected = "Set {x} and {: 3 How many? 3.00 Use \\boxed{}.\n"
    assert problem(record, template=template, prompt_field="absent").prompt == expected


def test_numpys_objects_are_taken_as_pythons():
    record = {"prompt": np.array(CHAT, dtype=object), "answer": np.float64(27)}
    assert problem(record) == Problem(prompt=tuple(CHAT), answer="27", source="f:1", extra=record)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((1e-7, "0.0000001"), (Decimal("1E-7"), "0.0000001"), (Decimal("0.10"), "0.10"), (np.float32(0.1), "0.1")),
        *(
            (np.float16(0.1), "0.1"),
            (1e21, "1" + "0" * 21),
            (10**399, "1" + "0" * 399),
            (Decimal("1e-999999"), "1E-999999"),
        ),
        *((27.0, "27"), (145.0, "145"), (0.5, "0.5"), (-0.0, "0"), (0, "0"), (7, "7"), (10**20, "1" + "0" * 20)),
        *((" 1,000 \n", "1,000"), ("27.0", "27.0"), ("\\frac{1}{2}", "\\frac{1}{2}"), ("0", "0"), (True, "True")),
    ],
)
def test_answers_are_text_without_artefacts(value, text):
    assert problem({"prompt": "?", "answer": value}).answer == text


def test_a_list_holds_several_correct_answers():
    record = {"prompt": "?", "answer": {"target": ["Paris", "City of Paris", "Paris "]}}
    assert problem(record, answer_field="answer.target").answer == ("Paris", "City of Paris")
    assert problem({"prompt": "?", "answer": np.array([7.0])}).answer == "7"
    assert problem({"prompt": "?", "answer": ["#### 1", "#### 2"]}, answer_pattern="#### (.+)").answer == ("1", "2")
    texts = Texts(completions=["4", "City of Paris", "Rome"], answers=["4", *[("Paris", "City of Paris")] * 2])
    assert ExactMatch()(texts) == [1.0, 1.0, 0.0]
    texts = Texts(completions=["0.5", "1/3", "2"], answers=[("3", r"\frac12"), ("1/3", "2"), ("1", "3")])
    assert MathVerify()(texts) == [1.0, 1.0, 0.0]


def test_the_answer_pattern_takes_its_last_match():
    record = {"prompt": "?", "answer": "#### 1\nno:\n####  1,234 \n"}
    assert problem(record, answer_pattern="#### (.+)").answer == "1,234"


def test_without_an_answer_field_the_last_reply_is_the_answer_or_there_is_none():
    assert problem({"prompt": "Write a poem.", "answer": "unused"}, answer_field=None).answer == ()
    record = {"prompt": [*CHAT, REPLY]}
    assert problem(record, answer_field=None) == Problem(
        prompt=tuple(CHAT), answer=REPLY["content"], source="f:1", extra=record
    )
    assert problem(record, answer_field=None, answer_pattern="#### (.+)").answer == "2"
    earlier = [CHAT[1], REPLY, CHAT[1]]
    assert (
        problem({"prompt": earlier}, answer_field=None).prompt,
        problem({"prompt": earlier}, answer_field=None).answer,
    ) == (
        tuple(earlier),
        (),
    )


def test_a_field_of_an_object_is_an_answer_and_the_object_reaches_the_reward():
    record = {"prompt": "?", "answer": {"value": 2.0, "unit": "m"}}
    found = problem(record, answer_field="answer.value")
    assert (found.answer, found.extra["answer"]) == ("2", {"value": 2.0, "unit": "m"})


@pytest.mark.parametrize("kind", [list, lambda parts: np.array(parts, dtype=object)])
def test_parts_with_text_are_joined(kind):
    parts = [{"type": "text", "text": "1+1", "image": None}, {"type": "text", "text": "=?"}]
    record = {"prompt": [CHAT[0], {"role": "user", "content": kind(parts)}], "answer": 2}
    assert problem(record).prompt == tuple(CHAT)


def test_sharegpts_names():
    turns = [{"from": "system", "value": "Think."}, {"from": "human", "value": "1+1=?"}]
    record = {"conversations": [*turns, {"from": "gpt", "value": "2"}]}
    found = problem(record, prompt_field="conversations", answer_field=None)
    assert (found.prompt, found.answer) == (tuple(CHAT), "2")
    assert problem({"conversations": turns, "answer": 2}, prompt_field="conversations").prompt == tuple(CHAT)


def test_every_column_is_in_extra_without_a_copy():
    record = {"prompt": "?", "answer": 1, "level": Decimal("0.10"), "tests": {"inputs": ["1", "2"]}, "unused": None}
    for fields in ({}, {"template": "{prompt} {level}"}):
        extra = problem(record, **fields).extra
        assert extra is record
    assert str(extra["level"]) == "0.10"


BAD_RECORDS = [
    ({"prompt": "a", "gt": {"x": 1, "y": 2}}, {}, r":1: data\.answer_field=answer, .* there are: prompt, gt\.x, gt\.y"),
    ({"question": "a", "answer": 1}, {}, r":1: data\.prompt_field=prompt, .* there are: question, answer"),
    ({}, {}, "there are no fields"),
    ({"prompt": "a", "gt": {"x": 1}}, {"answer_field": "gt.z"}, r"data\.answer_field=gt\.z"),
    ({"prompt": ["a"], "answer": 1}, {"prompt_field": "prompt.1"}, r"data\.prompt_field=prompt\.1"),
    ({"q": "a", "answer": 1}, {"template": "{question}"}, r":1: data\.template asks for 'question', .* are: q, answer"),
    (
        {"q": None, "answer": 1},
        {"template": "{q}"},
        r"data\.template asks for 'q', but the record has .* it is empty",
    ),
    ({"q": ["a"], "answer": 1}, {"template": "{q}"}, r":1: data\.template must give text or a number, got list"),
    ({"prompt": " \n", "answer": 1}, {}, r":1: the prompt that data\.prompt_field gives is empty"),
    ({"prompt": [], "answer": 1}, {}, r":1: the prompt that data\.prompt_field gives is empty"),
    ({"q": "", "answer": 1}, {"template": "{q} "}, r":1: the prompt that data\.template gives is empty"),
    ({"prompt": 3, "answer": 1}, {}, "must give text or a list of chat messages, got int"),
    ({"prompt": "a", "answer": " "}, {}, r":1: the answer that data\.answer_field=answer gives is empty"),
    ({"prompt": "a", "answer": None}, {}, r"data\.answer_field=answer, but the record has .* it is empty"),
    ({"prompt": "a", "answer": float("nan")}, {}, "it is empty"),
    ({"prompt": "a", "answer": [[1]]}, {}, r":1: data\.answer_field=answer must give text or a number, got list"),
    ({"prompt": "a", "answer": []}, {}, r":1: data\.answer_field=answer is an empty list"),
    ({"prompt": "a", "answer": ["1", " "]}, {}, r":1: the answer that data\.answer_field=answer gives is empty"),
    ({"prompt": "a", "answer": "1\ud800"}, {}, r":1: the answer that .* half a character"),
    ({"prompt": "a", "answer": "so 1"}, {"answer_pattern": "#### (.+)"}, r":1: data\.answer_pattern=.* ends in 'so 1'"),
    ({"prompt": "a", "answer": "####"}, {"answer_pattern": "####(.*)"}, ":1: the answer .* is empty"),
    ({"prompt": ["a"], "answer": 1}, {}, ":1: a chat message must have role and content, or from and value, got str"),
    ({"prompt": [{"from": "u", "value": "a"}], "answer": 1}, {}, ":1: .* role must be one of human, gpt, .*, got 'u'"),
    ({"prompt": [{"name": "u", "value": "a"}], "answer": 1}, {}, "or from and value, got the keys name, value"),
    ({"prompt": [{"role": "human", "content": "a"}], "answer": 1}, {}, "role must be one of .*user.*, got 'human'"),
    ({"prompt": [{"role": "user", "content": 1}], "answer": 1}, {}, ":1: .*content must be text or a list .*, got int"),
    ({"prompt": [{"role": "user", "content": [1]}], "answer": 1}, {}, ":1: a part .* must be an object .*, got int"),
    (
        {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "answer": 1},
        {},
        ":1: .* a part of the type 'image_url', but the policy reads only text",
    ),
    ({"prompt": [{"role": "user", "content": [{"type": "text"}]}], "answer": 1}, {}, ":1: .* but its text is None"),
    ({"prompt": [{"role": "user", "content": ""}], "answer": 1}, {}, ":1: the prompt is empty"),
    (
        {"prompt": [*CHAT, REPLY], "answer": 2},
        {},
        r":1: the last chat message is the assistant's; data\.answer_field=null takes it as the answer",
    ),
    (
        {"prompt": [*CHAT, REPLY, REPLY]},
        NO_FIELD,
        ":1: the last chat message is the assistant's, and so is the one before",
    ),
    ({"prompt": [REPLY]}, NO_FIELD, ":1: the prompt is empty: no chat message before the assistant's last one"),
    (
        {"prompt": [*CHAT, REPLY | {"content": " "}]},
        NO_FIELD,
        r":1: the answer that the assistant's last message \(.*\) gives is empty",
    ),
    (
        {"prompt": "a"},
        NO_FIELD | {"answer_pattern": "#### (.+)"},
        r":1: data\.answer_pattern=.* has no answer to search",
    ),
    (
        {"prompt": "a", "answer": {"value": 1, "unit": "m"}},
        {},
        r":1: data\.answer_field=answer is an object, .* one of its fields, answer\.value, answer\.unit",
    ),
    ({"prompt": "a", "answer": {}}, {}, ":1: .* is an object, .* it has no fields"),
]


@pytest.mark.parametrize(("record", "fields", "message"), BAD_RECORDS)
def test_bad_records(record, fields, message):
    with pytest.raises(ValueError, match=message):
        problem(record, **fields)
