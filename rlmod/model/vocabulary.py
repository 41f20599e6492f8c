"""The check that a second model, a guide or a teacher, reads the policy's token ids."""

from typing import TYPE_CHECKING

from rlmod.model.policy import HFPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_same_vocabulary(other: HFPolicy, tokenizer: "PreTrainedTokenizerBase", key: str, remedy: str) -> None:
    """Raise ValueError if the tokenizer of ``other`` differs from the policy's in a token or in its EOS.

    ``key`` is the config key of ``other``; ``remedy`` says why it matters and what would be right.
    """
    try:
        own = other.tokenizer()
    except ValueError as error:
        raise ValueError(str(error).replace("policy.path=", f"{key}.path=", 1)) from error
    mine, theirs = own.get_vocab(), tokenizer.get_vocab()
    if mine == theirs and own.eos_token_id == tokenizer.eos_token_id:
        return
    differ = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    example = (
        f", for example {differ[0]!r}"
        if differ
        else f", but the EOS token is {own.eos_token!r}, not {tokenizer.eos_token!r}"
    )
    raise ValueError(
        f"{key}.path={other.path}: its vocabulary differs from the policy's: {len(differ)} of {len(theirs)} tokens differ{example}. "
        f"{remedy}"
    )
