import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jaxtyping import TypeCheckError
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import rlmod
from rlmod.rollout.prompts import PromptEncoder, _say_that_chat_is_on
from rlmod.sampler.hf import HF
from rlmod.types import Problem
from tests.command_line import refused, refused_eval

TINY = Path(rlmod.__file__).parent / "model" / "policies" / "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role[0] }}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}a<{% endif %}"
)
CHAT = ({"role": "user", "content": "1+1"},)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def problem(prompt, line: int = 1) -> Problem:
    return Problem(prompt=prompt, answer="2", source=f"a.jsonl:{line}")


def problems(*prompts) -> list[Problem]:
    return [problem(prompt, line) for line, prompt in enumerate(prompts, 1)]


def text(encoded, tokenizer) -> list[str]:
    return [tokenizer.decode(row) for row in encoded.ids]


def test_plain_text(tokenizer):
    encoded = PromptEncoder().encode(problems("3+5:", "1-"), tokenizer)
    assert encoded.ids == ((23, 15, 25, 30), (21, 17))
    assert (len(encoded), encoded.dropped, encoded.pad_id) == (2, 0, tokenizer.pad_token_id)


def test_a_batch_is_padded_on_the_left(tokenizer):
    encoded = PromptEncoder().encode(problems("3+5:", "1-", "1"), tokenizer)
    batch = encoded.batch([1, 0])
    assert batch.ids.tolist() == [[0, 0, 21, 17], [23, 15, 25, 30]]
    assert batch.mask.tolist() == [[False, False, True, True], [True] * 4]
    assert batch.ids.dtype == torch.long
    assert batch.mask.dtype == torch.bool
    assert [p.source for p in batch.problems] == ["a.jsonl:2", "a.jsonl:1"]
    assert encoded.batch([2, 1]).ids.shape == (2, 2)  # as wide as its own longest


def test_the_pad_token_is_the_tokenizers(tokenizer):
    tokenizer.pad_token = "#"
    assert PromptEncoder().encode(problems("11", "1"), tokenizer).batch([0, 1]).ids[1].tolist() == [7, 21]
    tokenizer.pad_token = None
    assert PromptEncoder().encode(problems("11", "1"), tokenizer).batch([0, 1]).mask.tolist() == [
        [True] * 2,
        [False, True],
    ]


def test_messages_go_through_the_chat_template(chatty):
    encoded = PromptEncoder().encode(problems(CHAT, "2+2", CHAT), chatty)
    assert text(encoded, chatty) == ["u<1+1>a<", "u<2+2>a<", "u<1+1>a<"]


def test_the_chat_template_is_used_if_there_is_one_and_said_once(tokenizer, caplog):
    _say_that_chat_is_on.cache_clear()
    with caplog.at_level(logging.INFO):
        assert text(PromptEncoder().encode(problems("1+1"), tokenizer), tokenizer) == ["1+1"]
        assert not caplog.records
        tokenizer.chat_template = TEMPLATE
        for _ in range(2):  # the training and the held-out problems
            assert text(PromptEncoder().encode(problems("1+1"), tokenizer), tokenizer) == ["u<1+1>a<"]
        assert text(PromptEncoder(chat=False).encode(problems("1+1"), tokenizer), tokenizer) == ["1+1"]
    (record,) = caplog.records
    assert "data.encoder.chat=false leaves plain text as it is" in record.getMessage()


def test_text_that_has_been_through_a_template_is_named(chatty, caplog):
    PromptEncoder().encode(problems("1+1<eos>"), chatty)
    assert (
        "a.jsonl:1: the prompt holds the special token <eos>, so it may have been through a chat template"
        in caplog.text
    )
    caplog.clear()
    PromptEncoder(chat=False).encode(problems("1+1<eos>"), chatty)
    PromptEncoder().encode(problems("1+1", CHAT), chatty)
    assert not caplog.records


def test_the_shipped_policies_read_plain_text():
    for name in ("tiny", "strong"):
        assert not AutoTokenizer.from_pretrained(TINY.parent / name).chat_template


def test_plain_text_as_a_user_message(chatty):
    encoder = PromptEncoder(chat=True, system="Add.")
    assert text(encoder.encode(problems("1+1", CHAT), chatty), chatty) == ["s<Add.>u<1+1>a<"] * 2


def test_a_system_message_of_the_prompts_own(chatty):
    own = ({"role": "system", "content": "Own."}, *CHAT)
    assert text(PromptEncoder().encode(problems(own), chatty), chatty) == ["s<Own.>u<1+1>a<"]
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1: .* already has a system message; set data\.encoder\.system to null"
    ):
        PromptEncoder(system="Add.").encode(problems(own), chatty)


def test_a_system_message_needs_a_chat(tokenizer):
    with pytest.raises(ValueError, match=r"a\.jsonl:1: data\.encoder\.system .* tokenizer has no chat template"):
        PromptEncoder(system="Add.").encode(problems("1+1"), tokenizer)


def test_messages_where_chat_is_off(chatty):
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .* data\.encoder\.chat is false; set it to null"):
        PromptEncoder(chat=False).encode(problems("1+1", CHAT), chatty)


@pytest.mark.parametrize(("chat", "prompt"), [(None, CHAT), (True, "1+1")])
def test_a_tokenizer_without_a_chat_template(tokenizer, chat, prompt):
    with pytest.raises(ValueError, match=r"data\.encoder\.chat: .* no chat template; use an instruction-tuned"):
        PromptEncoder(chat=chat).encode(problems(prompt), tokenizer)


def test_a_chat_template_that_refuses(chatty):
    with pytest.raises(ValueError, match=r"data\.encoder: .* rejects the messages: no tools here"):
        PromptEncoder().encode(problems(({"role": "tool", "content": "x"},)), chatty)


THINKING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if not greeting is defined %}{% set greeting = 'h' %}{% endif %}{{ greeting }}"
    "{% generation %}{% endgeneration %}{% for m in messages %}u<{{ m.content }}>{% endfor %}"
    "a<{% if enable_thinking is defined and not enable_thinking %}#{% endif %}"
)


def test_arguments_reach_the_chat_template_and_one_that_it_does_not_read_is_named(tokenizer, caplog):
    tokenizer.chat_template = THINKING
    encoder = PromptEncoder(template_arguments={"enable_thinking": False, "greeting": "8", "tools": [{"a": 1}]})
    assert "8u<1+1>a<#" in text(encoder.encode(problems(CHAT), tokenizer), tokenizer)[0]
    assert not caplog.records
    misspelt = PromptEncoder(template_arguments={"enable_thinkng": False})
    assert text(misspelt.encode(problems(CHAT), tokenizer), tokenizer) == ["hu<1+1>a<"]
    assert "template_arguments.enable_thinkng has no effect" in caplog.text
    assert "did you mean enable_thinking?" in caplog.text


def test_arguments_of_the_template_in_a_command_line(tmp_path, monkeypatch):
    given = "+data.encoder.template_arguments"
    message = refused(monkeypatch, tmp_path, "debug=short", f"{given}.enable_thinking=false")
    assert "data.encoder.template_arguments is set, but the prompt is plain text, and the policy's tokenizer" in message
    message = refused_eval(monkeypatch, "policy=tiny", f"output={tmp_path / 'a'}", f"{given}.tokenize=false")
    assert (
        "data.encoder.template_arguments.tokenize is an argument of apply_chat_template that rlmod sets itself"
        in message
    )


def test_special_tokens_in_front_stay_and_an_eos_at_the_end_goes(chatty):
    special = [("#", chatty.convert_tokens_to_ids("#")), ("<eos>", chatty.eos_token_id)]
    processor = TemplateProcessing(single="# $A <eos>", pair="# $A $B <eos>", special_tokens=special)
    chatty.backend_tokenizer.post_processor = processor
    assert chatty("1+1")["input_ids"][-1] == chatty.eos_token_id
    assert text(PromptEncoder(chat=False).encode(problems("1+1"), chatty), chatty) == ["#1+1"]
    assert text(PromptEncoder().encode(problems(CHAT), chatty), chatty) == ["u<1+1>a<"]


def test_an_eos_that_a_chat_template_ends_with_stays(chatty):
    chatty.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    assert text(PromptEncoder().encode(problems(CHAT), chatty), chatty) == ["1+1<eos>"]


@pytest.mark.parametrize("chat", [False, True])
def test_the_way_without_offsets_gives_the_tokenizers_own_tokens(chat, chatty):
    """Also where tokenizer.json says to truncate and to pad, and where special tokens are added."""
    chatty.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 7)])
    chatty.backend_tokenizer.enable_truncation(2)
    chatty.backend_tokenizer.enable_padding()
    asked = ["1", "1+1+1", "<eos>3", "17-3*2", ""] if chat else ["1", "1+1+1", "<eos>3", "17-3*2"]
    encoded = PromptEncoder(chat=chat).encode(problems(*asked), chatty)
    own = [
        chatty.apply_chat_template([{"role": "user", "content": each}], add_generation_prompt=True, return_dict=False)
        if chat
        else chatty(each)["input_ids"]
        for each in asked
    ]
    assert [list(row) for row in encoded.ids] == own
    assert len({len(row) for row in own}) > 2


def test_a_tokenizer_class_with_a_way_of_its_own_keeps_it(chatty):
    class Own(type(chatty)):
        def _encode_plus(self, text, **settings):
            return super()._encode_plus([each.replace("x", "*") for each in text], **settings)

    own = Own.from_pretrained(TINY)
    assert text(PromptEncoder().encode(problems("3x5:", "1x2"), own), own) == ["3*5:", "1*2"]


def test_a_tokenizer_class_with_chats_of_its_own_keeps_them(chatty):
    class Own(type(chatty)):
        def apply_chat_template(self, conversation, *, tokenize, **_):
            assert tokenize
            return [[7, 8] for _ in conversation]

    own = Own.from_pretrained(TINY)
    own.chat_template = TEMPLATE
    assert PromptEncoder().encode(problems("3+5", "1"), own).ids == ((7, 8), (7, 8))


def test_a_prompt_without_tokens(tokenizer):
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the tokenizer returns no tokens for the prompt ''"):
        PromptEncoder().encode(problems("1", ""), tokenizer)


def test_prompts_that_are_too_long_are_left_out(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        encoded = PromptEncoder(max_tokens=3).encode(problems("123", "1234", "12345", "1"), tokenizer)
    assert [p.prompt for p in encoded.problems] == ["123", "1"]
    assert text(encoded, tokenizer) == ["123", "1"]
    assert encoded.dropped == 2
    assert "2 of 4 prompts are longer than data.encoder.max_tokens=3" in caplog.text
    assert "a.jsonl:2" in caplog.text


def test_no_warning_without_a_loss(tokenizer, caplog):
    assert PromptEncoder(max_tokens=3).encode(problems("123"), tokenizer).dropped == 0
    assert not caplog.records


def test_all_prompts_are_too_long(tokenizer):
    with pytest.raises(
        ValueError, match=r"all 2 prompts are longer than data\.encoder\.max_tokens=1 .*shortest has 2 tokens"
    ):
        PromptEncoder(max_tokens=1).encode(problems("12", "123"), tokenizer)


def test_prompt_and_completion_must_fit_an_engines_length(tokenizer):
    encoded = PromptEncoder().encode(
        [Problem(prompt=p, answer="", source=f"a.jsonl:{len(p)}") for p in ("1+1=", "12")], tokenizer
    )
    longest = max(map(len, encoded.ids))
    encoded.check_max_model_len(SimpleNamespace(max_model_len=longest + 5, max_new_tokens=5), "sampler")
    encoded.check_max_model_len(SimpleNamespace(max_model_len=None, max_new_tokens=5), "sampler")
    given = {"max_model_len": longest + 5}
    encoded.check_max_model_len(
        SimpleNamespace(max_model_len=1, max_new_tokens=5, engine=given), "sampler"
    )  # it has the last word
    message = rf"validation.sampler.max_model_len={longest + 4}: the longest prompt has {longest} tokens \(a.jsonl:4\).*{longest + 5}"
    with pytest.raises(ValueError, match=message):
        encoded.check_max_model_len(SimpleNamespace(max_model_len=longest + 4, max_new_tokens=5), "validation.sampler")


def test_too_long_as_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the prompt has 4 tokens, more than data\.encoder\.max_tokens=3"):
        PromptEncoder(max_tokens=3, too_long="error").encode(problems("123", "1234"), tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, r"data\.encoder\.max_tokens"),
        ({"too_long": "cut"}, "too_long"),
        ({"chat": False, "system": "Add."}, r"data\.encoder\.system='Add\.' needs a chat"),
        ({"template_arguments": "a=1"}, r"template_arguments"),
        ({"template_arguments": {"padding": True}}, r"data\.encoder\.template_arguments\.padding is an argument of"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises((ValueError, TypeCheckError), match=message):
        PromptEncoder(**fields)


@dataclass(frozen=True, kw_only=True)
class Limited(HF):
    max_model_len: int | None = None


@pytest.mark.parametrize(("key", "without"), [("sampler", ("data.validation=null",)), ("validation.sampler", ())])
def test_a_run_whose_prompts_do_not_fit_does_not_begin(key, without, tmp_path, monkeypatch):
    limited = (f"{key}._target_=tests.rollout.test_prompts.Limited", f"+{key}.max_model_len=41")
    message = refused(monkeypatch, tmp_path, "debug=short", *limited, *without)
    assert f"{key}.max_model_len=41: the longest prompt has" in message
    assert f"{key}.max_new_tokens=40" in message


def test_nor_does_an_evaluation(tmp_path, monkeypatch):
    limited = (
        "sampler._target_=tests.rollout.test_prompts.Limited",
        "+sampler.max_model_len=41",
        "sampler.max_new_tokens=40",
    )
    message = refused_eval(monkeypatch, "policy=tiny", f"output={tmp_path / 'a'}", "data.validation.size=16", *limited)
    assert "sampler.max_model_len=41: the longest prompt has" in message
