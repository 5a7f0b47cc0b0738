"""From prompts of units and items to a prefix forest of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase

from recbole_sdpo.data.catalogue import LONGEST_TITLE, Catalogue, folded
from recbole_sdpo.data.prompts import Prompts, Units
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.forest import Forest, cut_wide, plant
from recbole_sdpo.lm.text import (
    BYTE_LEVEL,
    encode_texts,
    line_breaks,
    name_of,
    opening_tokens,
    shorten,
)
from recbole_sdpo.ragged import Ragged, exclusive_cumsum, segment_sums

TERMINATOR = "\n"
"""Ends a title, in a prompt and in a response, so that none is the beginning of another: titles
hold no white space but single blanks."""


class Encoder:
    """Tokenises every title and every template piece once, each apart from its surroundings.

    Args:
        catalogue: the titles.
        units: the numbering of titles and template pieces.
        tokenizer: the backbone's.
        padding: of a forest, as :attr:`LanguageModel.padding` has it.
        breadth: of a row, as :attr:`LanguageModel.breadth` has it.

    Raises:
        UserError: a title is too long, or the tokenizer makes something else of it, of its
            terminator or of a template.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        units: Units,
        tokenizer: PreTrainedTokenizerBase,
        padding: tuple[int, int] = (1, 1),
        breadth: float = math.inf,
    ) -> None:
        self.padding, self.breadth = padding, breadth
        opening = opening_tokens(tokenizer)
        texts = [*title_lines(catalogue)[1:], *units.pieces]  # the padding has no title
        rows = encode_texts(tokenizer, texts)
        _check_reading(tokenizer, texts, rows)
        rows = [[], *rows]
        _check_titles(tokenizer, catalogue, rows[: units.items])
        first = {units.header, *(layout[0] for layout in units.templates)}
        self.tokens = Ragged.from_rows(
            [opening + row if unit in first else row for unit, row in enumerate(rows)]
        )

    def trunks(self, prompts: Prompts) -> Ragged:
        """The tokens of each trunk."""
        return self.tokens.take(prompts.trunks.values).join(prompts.trunks.lengths)

    def forest(self, prompts: Prompts, items: np.ndarray) -> Forest:
        """The forest whose responses are the titles of ``items`` after each target's prompt.

        Args:
            items: int64 ``[T, C]``; response ``t * C + c`` is the title of ``items[t, c]`` after
                target ``t``'s prompt.
        """
        trunk_units = self.tokens.take(prompts.trunks.values)
        trunks = trunk_units.join(prompts.trunks.lengths)
        unit_start = exclusive_cumsum(trunk_units.lengths)
        # A prompt's tokens end where its last unit ends.
        last = prompts.trunks.starts[prompts.tree] + prompts.before - 1
        start = unit_start[last] + trunk_units.lengths[last] - trunks.starts[prompts.tree]
        each, branch = items.shape[1], (self.tokens.lengths[items] - 1).sum(1)
        trunks, tree = cut_wide(trunks, prompts.tree, branch, self.breadth)
        responses = self.tokens.take(items.ravel())
        return plant(trunks, tree.repeat(each), start.repeat(each), responses, *self.padding)

    def sizes(self, prompts: Prompts, items: np.ndarray) -> np.ndarray:
        """Tokens in each tree, counted as if no two responses shared any: an upper bound, int64
        ``[trees]``."""
        trunk = segment_sums(self.tokens.lengths[prompts.trunks.values], prompts.trunks.lengths)
        # A response's last token takes no place.
        branch = (self.tokens.lengths[items] - 1).sum(1)
        np.add.at(trunk, prompts.tree, branch)
        return trunk


def title_lines(catalogue: Catalogue) -> list[str]:
    """Each title with its terminator.

    Raises:
        UserError: a title is longer than :data:`LONGEST_TITLE`.
    """
    for title in catalogue.titles:
        if len(title) > LONGEST_TITLE:
            raise UserError(
                f"the title {shorten(title)} has {len(title)} characters and must have "
                f"{LONGEST_TITLE} at most; mend or shorten it in the .item file, or choose other "
                "title_fields."
            )
    return [title + TERMINATOR for title in catalogue.titles]


def _check_reading(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], rows: Sequence[list[int]]
) -> None:
    """Does the tokenizer keep each text, whenever it is asked, case, blanks and compatible forms
    of characters aside?"""
    again = encode_texts(tokenizer, texts[::-1][:1000])
    read = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    for text, back in zip(texts, read, strict=True):
        if _letters(back) != _letters(text):
            raise UserError(
                f"tokenizer {name_of(tokenizer)} makes {shorten(back)} of {shorten(text)}; "
                f"{BYTE_LEVEL}."
            )
    for text, ids, other in zip(reversed(texts), reversed(rows), again, strict=False):
        if ids != other:
            raise UserError(
                f"tokenizer {name_of(tokenizer)} encodes {shorten(text)} otherwise each time; "
                f"{BYTE_LEVEL}."
            )


def _check_titles(
    tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Sequence[list[int]]
) -> None:
    """Is each title a line of its own? Then none is the beginning of another, and an answer ends
    where its title does."""
    ends = line_breaks(tokenizer, {*chain.from_iterable(rows)})
    owner: dict[tuple[int, ...], int] = {}
    for item, ids in enumerate(rows[1:], 1):
        if not ids or ids[-1] not in ends or not ends.isdisjoint(ids[:-1]):
            title = shorten(catalogue.titles[item] + TERMINATOR)
            raise UserError(
                f"tokenizer {name_of(tokenizer)} does not end {title} with its line break; "
                f"{BYTE_LEVEL}."
            )
        other = owner.setdefault(tuple(ids), item)
        if catalogue.group[other] != catalogue.group[item]:
            both = " and ".join(shorten(catalogue.titles[which]) for which in (other, item))
            raise UserError(
                f"tokenizer {name_of(tokenizer)} makes no difference between the titles {both}; "
                f"{BYTE_LEVEL}."
            )


def _letters(text: str) -> str:
    return "".join(
        character for character in folded(text) if character.isprintable() and character != " "
    )
