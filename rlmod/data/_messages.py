"""Chat messages in the forms in which data sets hold them: with role and content, with content parts, and ShareGPT's."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlmod.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's own names of roles; it also has those of ``ROLES``."""


def to_messages(turns: Sequence, source: str) -> tuple[Message, ...]:
    """Convert the turns of a record to messages with a role and a text. ValueError, with the source, for anything else."""
    return tuple(_to_message(turn, source) for turn in turns)


def _to_message(turn: Any, source: str) -> Message:
    if isinstance(turn, Mapping) and {"role", "content"} <= turn.keys():
        role, content, accepted = turn["role"], turn["content"], ROLES
    elif isinstance(turn, Mapping) and {"from", "value"} <= turn.keys():
        role, content, accepted = turn["from"], turn["value"], (*SHAREGPT_ROLES, *ROLES)
    else:
        got = f"the keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else type(turn).__name__
        raise ValueError(f"{source}: a chat message must have role and content, or from and value, got {got}")
    if role not in accepted:
        raise ValueError(f"{source}: a chat message's role must be one of {', '.join(accepted)}, got {role!r}")
    return {"role": SHAREGPT_ROLES.get(str(role), str(role)), "content": _to_content(content, source)}


def _to_content(content: object, source: str) -> str:
    if isinstance(content, str):
        return content
    if hasattr(content, "tolist"):  # numpy's array, as pandas keeps lists
        content = content.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(content, Sequence):
        raise ValueError(
            f"{source}: a chat message's content must be text or a list of parts with text, got {type(content).__name__}"
        )
    return "".join(_to_part(part, source) for part in content)


def _to_part(part: object, source: str) -> str:
    if not isinstance(part, Mapping):
        raise ValueError(
            f"{source}: a part of a chat message's content must be an object with type and text, got {type(part).__name__}"
        )
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        raise ValueError(
            f"{source}: a chat message's content has a part of the type {kind!r}, but the policy reads only text: leave such records out"
        )
    if not isinstance(text, str):
        raise ValueError(f"{source}: a part of a chat message's content has the type text, but its text is {text!r}")
    return text
