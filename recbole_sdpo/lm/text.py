"""Text to token ids, with no way for the text to become a control token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from recbole_sdpo.errors import UserError

PLAIN = re.compile(r"\s*|.|<0x[0-9A-F]{2}>", re.DOTALL)
"""Added tokens that are text."""

BYTE_LEVEL = (
    "choose a backbone whose tokenizer knows all bytes, such as a SmolLM2, Llama, Qwen, Gemma or "
    "GPT-2"
)
"""What helps against a tokenizer that changes or does not know a text."""


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise each of ``texts`` as text: where a control token would come of it, such as
    ``<|im_end|>``, it is cut first.

    The ids decide, whatever the tokenizer's normaliser makes of the text before it looks for its
    tokens.

    Raises:
        UserError: a character becomes a control token, which is mostly the unknown one.
    """
    control = control_tokens(tokenizer)
    rows = zip(texts, _ids(tokenizer, texts), strict=True)
    return [
        ids if control.isdisjoint(ids) else _cut(tokenizer, text, control) for text, ids in rows
    ]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special and the added tokens, the unknown one too.

    Those of white space (Gemma's runs of newlines, say), of one character or of one byte
    (``<0x0A>``) control nothing.
    """
    names = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return {*tokenizer.convert_tokens_to_ids([name for name in names if not PLAIN.fullmatch(name)])}


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that this tokenizer puts before any text (``<s>``, or none), and not those that it
    puts behind one.

    Raises:
        UserError: it tells text and what stands around it not apart.
    """
    (plain,), (around,) = (_ids(tokenizer, ["a"], special) for special in (False, True))
    for start in range(len(around) - len(plain) + 1):
        if around[start : start + len(plain)] == plain:
            return around[:start]
    raise UserError(
        f"tokenizer {name_of(tokenizer)} encodes a text otherwise when it adds its special "
        f"tokens; {BYTE_LEVEL}."
    )


def line_breaks(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> set[int]:
    """Those of ``tokens`` with a line break in them."""
    tokens = list(tokens)
    texts = tokenizer.batch_decode(
        [[token] for token in tokens], clean_up_tokenization_spaces=False
    )
    return {token for token, text in zip(tokens, texts, strict=True) if "\n" in text}


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What an error calls it."""
    return repr(str(tokenizer.name_or_path)) if tokenizer.name_or_path else type(tokenizer).__name__


def shorten(text: str) -> str:
    """``text`` as an error shows it."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = False
) -> list[list[int]]:
    return (
        tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        if len(texts)
        else []
    )


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, control: set[int]) -> list[int]:
    """The ids of the longest beginning of ``text`` of which no control token comes, of the
    longest of what is left, and so on."""
    ids: list[int] = []
    left = text
    while left:
        clean, row, dirty, tried = 0, [], len(left) + 1, len(left)
        while dirty - clean > 1:
            (attempt,) = _ids(tokenizer, [left[:tried]])
            if control.isdisjoint(attempt):
                clean, row = tried, attempt
            else:
                dirty = tried
            tried = (clean + dirty) // 2
        if not clean:
            token = tokenizer.convert_ids_to_tokens(
                next(token for token in attempt if token in control)
            )
            raise UserError(
                f"tokenizer {name_of(tokenizer)} makes the control token {token!r} of {left[0]!r} "
                f"in {shorten(text)}; {BYTE_LEVEL}."
            )
        ids, left = ids + row, left[clean:]
    return ids
