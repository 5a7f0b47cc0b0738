"""Rows of files that are split already: who is asked for what, after which history; and what of it
a model learns that knows no sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recbole_sdpo.ragged import Ragged, places


@dataclass(frozen=True)
class SplitRows:
    """The rows of one part.

    Attributes:
        user, target: int64 ``[rows]``.
        history: the items before each target, oldest first, as long as in the file.
    """

    user: np.ndarray
    history: Ragged
    target: np.ndarray

    @property
    def of_history(self) -> np.ndarray:
        """The events of the histories, int64 ``[2, events]``: users and items."""
        return np.stack([np.repeat(self.user, self.history.lengths), self.history.values])

    @cached_property
    def met(self) -> np.ndarray:
        """The distinct pairs of user and item, targets included, int64 ``[2, pairs]``."""
        return distinct(
            np.concatenate([self.of_history, np.stack([self.user, self.target])], axis=1)
        )


def distinct(events: np.ndarray) -> np.ndarray:
    """The distinct columns of ``events [2, events]``, sorted."""
    users, items = events
    each = items.max(initial=0) + 1  # one number for a pair sorts many times as fast as two
    return np.stack(np.divmod(np.unique(users * each + items), each))


def known_events(train: SplitRows, *asked: SplitRows) -> np.ndarray:
    """What a model without sequences may learn, int64 ``[2, events]``: all events of the rows of
    training, and of the others those events of their histories that none of them asks for.

    Users of rows that are only asked would be strangers without their histories. But rows may be of
    one person, whose next row shows what the one before it asked for::

        a user of the test    history          target
        test-1                A B C            D
        test-2                A B C D          E       D is asked for by test-1

    An event is asked for where some row has the item before it at the end of its history, and the
    event as its target. The first event of a history that may have been cut, being of the greatest
    length, has no item before it: it is asked for if it is any row's target.
    """
    rows = [part for part in asked if len(part.history.values)]
    learned = [train.met]
    if rows:
        target = np.concatenate([part.target for part in rows])
        history = Ragged.stack([part.history for part in rows])
        events = np.concatenate([part.of_history for part in rows], axis=1)
        learned.append(events[:, ~_asked(history, target)])
    return distinct(np.concatenate(learned, axis=1))


def _asked(history: Ragged, target: np.ndarray) -> np.ndarray:
    """Which events of ``history`` are targets of its rows, as above? bool ``[events]``."""
    event, each = history.values, 1 + max(history.values.max(), target.max())
    shown = history.lengths > 0
    last = event[(history.starts + history.lengths - 1)[shown]]
    before = np.concatenate([[0], event[:-1]])
    asked = np.isin(before * each + event, last * each + target[shown])
    first = places(history.lengths) == 0
    cut = np.repeat(history.lengths == history.lengths.max(), history.lengths)
    return np.where(first, cut & np.isin(event, target), asked)


def strangers(train: SplitRows, *asked: SplitRows) -> bool:
    """Is someone asked who has no row of training?"""
    return any(not np.isin(part.user, train.user).all() for part in asked)


def unknown(known: np.ndarray, parts: Sequence[SplitRows]) -> int:
    """How many rows of ``parts`` are of users without an event in ``known``."""
    return sum(int((~np.isin(part.user, known[0])).sum()) for part in parts)
