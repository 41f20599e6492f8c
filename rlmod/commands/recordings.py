"""Recorded completions: rlmod's own lines, samples of lm-evaluation-harness, and logs of Inspect.

own        .jsonl, one object per line with ``completion`` and ``answer``
lm-eval    .jsonl, its samples_*.jsonl: ``doc``, ``target``, ``resps``; every response is a completion
Inspect    .json, one object with ``samples``: ``target`` and ``output.choices``; every choice is a completion

The fields of the file decide which of them it is.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlmod import jsonl
from rlmod.types import Answer

log = logging.getLogger(__name__)

Located = tuple[str, dict[str, Any]]
"""The place of a completion, for error messages, and its record, which has ``completion`` and ``answer``."""


def read_recordings(source: Path) -> list[Located]:
    """Return the location and the record of each completion. ValueError for a missing file or an invalid record."""
    if not source.is_file():
        raise ValueError(f"completions={source}: there is no such file; relative paths start at {Path.cwd()}")
    if source.suffix.lower() == ".eval":
        raise ValueError(
            f"completions={source}: a compressed log of Inspect; convert it first: inspect log convert {source} --to json --output-dir DIR"
        )
    if source.suffix.lower() == ".json":
        return list(_inspect(source))
    found: list[Located] = []
    lines = list(jsonl.read_objects(source))
    if not lines:
        raise ValueError(f"completions={source}: the file is empty")
    if _is_lm_eval(lines[0][1]):
        found = list(_lm_eval(source, lines))
        if any(isinstance(record["answer"], str) and "\n" in record["answer"].strip() for _, record in found):
            log.warning(
                "targets of %s have several lines, as GSM8K's solutions do: reward=math_verify reads the answer after ####, while "
                "reward=exact_match compares with the whole text",
                source,
            )
        return found
    for where, record in lines:
        for field in ("completion", "answer"):
            if field not in record:
                raise ValueError(f"{where}: no field {field}; it has {', '.join(record) or 'none'}")
        if not isinstance(record["completion"], str):
            raise ValueError(f"{where}: completion must be text, got {type(record['completion']).__name__}")
        _check_answers(record["answer"], "answer", where)
        found.append((where, record))
    return found


def answer_of(record: Mapping[str, Any]) -> Answer:
    """Return the answer as text, or several; a float that is a whole number has no decimals (27.0 is 27)."""
    answer = record["answer"]
    if isinstance(answer, list):
        texts = tuple(dict.fromkeys(map(_text, answer)))
        return texts[0] if len(texts) == 1 else texts
    return _text(answer)


def _text(answer: str | int | float) -> str:
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()


def _check_answer(answer: object, field: str, where: str) -> None:
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise ValueError(f"{where}: {field} must be text or a number, got {answer!r}")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"{where}: {field} must be a finite number, got {answer}")


def _check_target(record: Mapping[str, Any], where: str) -> Any:
    """Return ``target``: one answer, or a list of answers of which each is correct."""
    target = record.get("target")
    _check_answers(target, "target", where)
    return target


def _check_answers(answers: object, field: str, where: str) -> None:
    """ValueError unless it is an answer or a list of answers of which each is correct."""
    for one in answers if isinstance(answers, list) and answers else [answers]:
        _check_answer(one, field, where)


def _is_lm_eval(record: Mapping[str, Any]) -> bool:
    return "resps" in record and "completion" not in record


def _lm_eval(source: Path, lines: list[Located]) -> Iterator[Located]:
    """Yield each response. A task with several filters repeats its documents once per filter: those of the first filter count."""
    first, repeated = lines[0][1].get("filter"), 0
    for where, record in lines:
        for field in ("doc", "target", "resps"):
            if field not in record:
                raise ValueError(
                    f"{where}: no field {field}, as samples of lm-eval have; it has {', '.join(record) or 'none'}"
                )
        if record.get("filter") != first:
            repeated += 1
            continue
        answer = _check_target(record, where)
        responses = record["resps"]
        # A list per request of the document, each with one text per repeat.
        texts = (
            [text for each in responses for text in (each if isinstance(each, list) else [each])]
            if isinstance(responses, list)
            else []
        )
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f'{where}: resps must hold generated texts, as [["text"]], got {json.dumps(responses)[:80]}; tasks that compare the '
                "likelihoods of given answers generate none"
            )
        shared = {name: record[name] for name in ("doc_id", "doc") if name in record}
        for text in texts:
            yield where, {**shared, "completion": text, "answer": answer}
    if repeated:
        log.warning(
            "%s: %d lines repeat the responses for another filter than %s; each response is scored once, as a whole",
            *(source, repeated, first),
        )


def _inspect(source: Path) -> Iterator[Located]:
    try:
        record = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source}:{error.lineno}: not a JSON file: {error.msg}; lines of objects need the ending .jsonl"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not a JSON file: {error}") from error
    samples = record.get("samples") if isinstance(record, dict) else None
    if not isinstance(samples, list) or not samples:
        raise ValueError(
            f"completions={source}: a .json file must be a log of Inspect, an object with a list of samples, which was written with "
            "the samples included; completions one per line need the ending .jsonl"
        )
    for number, sample in enumerate(samples):
        where = f"{source}: samples[{number}]"
        if not isinstance(sample, dict):
            raise ValueError(f"{where}: a sample must be an object, got {type(sample).__name__}")
        where += f" (id {sample['id']}, epoch {sample.get('epoch', 1)})" if "id" in sample else ""
        if half := jsonl.SURROGATE.search(json.dumps(sample, ensure_ascii=False)):
            raise ValueError(
                f"{where}: {half[0]!r} is half a character: a surrogate without its pair is not valid text"
            )
        answer = _check_target(sample, where)
        shared = {name: sample[name] for name in ("id", "epoch", "input") if name in sample}
        for text in _choices(sample, where):
            yield where, {**shared, "completion": text, "answer": answer}


def _choices(sample: Mapping[str, Any], where: str) -> list[str]:
    output = sample.get("output")
    choices = output.get("choices") if isinstance(output, dict) else None
    if not isinstance(choices, list) or not choices:
        failed = (
            f": the sample failed ({sample['error'].get('message')})" if isinstance(sample.get("error"), dict) else ""
        )
        raise ValueError(
            f"{where}: output.choices must hold at least one choice{failed}; remove the sample, or run it again"
        )
    return [_content(choice, f"{where}: output.choices[{number}]") for number, choice in enumerate(choices)]


def _content(choice: Any, where: str) -> str:
    """Return the text of a choice's message. Its reasoning is a part of its own, and not of the text."""
    message = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise ValueError(f"{where}.message.content must be text or a list of parts, got {type(content).__name__}")
    return content
