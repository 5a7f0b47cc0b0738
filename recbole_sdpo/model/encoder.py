"""From prompts of units and items to a prefix forest of tokens."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.prompts import Prompts, Units
from recbole_sdpo.lm.forest import Forest, plant
from recbole_sdpo.lm.text import encode_text, opening_tokens
from recbole_sdpo.ragged import Ragged, exclusive_cumsum, segment_sums

TERMINATOR = "\n"
"""Ends a title, in a prompt and in a response, so that none is the beginning of another: titles hold no white space but single
blanks."""


class Encoder:
    """Tokenises every title and every template piece once, each apart from its surroundings.

    Args:
        catalogue: the titles.
        units: the numbering of titles and template pieces.
        tokenizer: the backbone's.
    """

    def __init__(self, catalogue: Catalogue, units: Units, tokenizer: PreTrainedTokenizerBase) -> None:
        opening = opening_tokens(tokenizer)
        titles = [encode_text(tokenizer, title + TERMINATOR) for title in catalogue.titles]
        pieces = [encode_text(tokenizer, piece) for piece in units.pieces]
        first = {units.header, *(layout[0] for layout in units.templates)}
        pieces = [opening + piece if units.header + i in first else piece for i, piece in enumerate(pieces)]
        self.tokens = Ragged.from_rows(titles + pieces)

    def trunks(self, prompts: Prompts) -> Ragged:
        """The tokens of each trunk."""
        return self.tokens.take(prompts.trunks.values).join(prompts.trunks.lengths)

    def forest(self, prompts: Prompts, items: np.ndarray) -> Forest:
        """The forest whose responses are the titles of ``items`` after each target's prompt.

        Args:
            items: int64 ``[T, C]``; response ``t * C + c`` is the title of ``items[t, c]`` after target ``t``'s prompt.
        """
        trunk_units = self.tokens.take(prompts.trunks.values)
        trunks = trunk_units.join(prompts.trunks.lengths)
        unit_start = exclusive_cumsum(trunk_units.lengths)
        # A prompt's tokens end where its last unit ends.
        last = prompts.trunks.starts[prompts.tree] + prompts.before - 1
        start = unit_start[last] + trunk_units.lengths[last] - trunks.starts[prompts.tree]
        each = items.shape[1]
        return plant(trunks, prompts.tree.repeat(each), start.repeat(each), self.tokens.take(items.ravel()))

    def sizes(self, prompts: Prompts, items: np.ndarray) -> np.ndarray:
        """Tokens in each tree, counted as if no two responses shared any: an upper bound, int64 ``[trees]``."""
        trunk = segment_sums(self.tokens.lengths[prompts.trunks.values], prompts.trunks.lengths)
        # A response's last token takes no place.
        branch = (self.tokens.lengths[items] - 1).sum(1)
        np.add.at(trunk, prompts.tree, branch)
        return trunk
