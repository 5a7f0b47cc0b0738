"""Text to token ids, with no way for the text to become a control token."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise ``text`` as text: what spells an added token, such as ``<|im_end|>``, is taken apart first.

    Added tokens that are only white space or a single character (Gemma's runs of newlines, say) control nothing and stay.
    """
    control = [token for token in tokenizer.get_added_vocab() if len(token) > 1 and not token.isspace()]
    if not any(token in text for token in control):
        return tokenizer.encode(text, add_special_tokens=False)
    spelled = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
    pieces, start = [], 0
    for match in spelled.finditer(text):
        pieces.append(text[start : match.start() + 1])
        start = match.start() + 1
    pieces.append(text[start:])
    return [token for piece in pieces for token in encode_text(tokenizer, piece)]


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that this tokenizer puts before any text (``<s>``, or none)."""
    return tokenizer.encode("", add_special_tokens=True)
