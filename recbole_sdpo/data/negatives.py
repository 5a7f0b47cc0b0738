"""Negatives from RecBole's samplers: distinct, of distinct titles, and never an item that the
user has met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from recbole.sampler.sampler import AbstractSampler

from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.errors import UserError
from recbole_sdpo.ragged import places

SELF = "self"
"""The source of negatives that is the policy: what it ranks highest."""


class Negatives(Protocol):
    """Where negatives come from."""

    def draw(
        self, user: np.ndarray, target: np.ndarray, number: int, beside: np.ndarray | None = None
    ) -> np.ndarray:
        """``number`` negatives for each of the given users and targets, int64 ``[len(user),
        number]``; none of a title that is ``beside [len(user), m]``."""

    def excluded(self, user: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What may not be drawn for the given users and targets: pairs of a row and the number of
        a title, as in :attr:`Catalogue.group`, two int64 arrays."""


@dataclass
class NegativeSampler:
    """Draws negatives for users and targets.

    RecBole's samplers may repeat an item, draw an item of the history (``repeatable``), or one that
    reads like the target. Here a sampler of RecBole proposes, by its own distribution, and what may
    not be is drawn anew.

    Args:
        sampler: a sampler of RecBole, whose ``sampling`` proposes item ids.
        catalogue: items of one title count as one.
        met: (users, items) that may not be drawn, as two int64 arrays.
        setting: what asks for the negatives, for the error message.
        users: the users' ids in the data, by RecBole's internal id, for the same.
    """

    sampler: AbstractSampler
    catalogue: Catalogue
    met: tuple[np.ndarray, np.ndarray]
    setting: str
    users: np.ndarray

    def __post_init__(self) -> None:
        users, items = self.met
        self._groups = int(self.catalogue.group.max()) + 1
        self._met = np.unique(users * self._groups + self.catalogue.group[items])

    def draw(
        self, user: np.ndarray, target: np.ndarray, number: int, beside: np.ndarray | None = None
    ) -> np.ndarray:
        """As :meth:`Negatives.draw`.

        Raises:
            UserError: a user has fewer than ``number`` items to draw from.
        """
        group = self.catalogue.group
        others = np.zeros((len(user), 0), np.int64) if beside is None else group[beside]
        self.check(user, target, number, others)
        drawn = np.zeros((len(user), number), np.int64)
        todo = np.ones(drawn.shape, bool)
        while todo.any():
            drawn[todo] = self.sampler.sampling(int(todo.sum()))
            rows = np.flatnonzero(todo.any(1))
            titles = group[drawn[rows]]
            # RecBole's alias table can give -1 where rounding leaves an item without a partner.
            bad = (drawn[rows] < 1) | (titles == group[target[rows], None])
            bad |= repeats(np.hstack([others[rows], titles]))[:, others.shape[1] :]
            bad |= _is_in(user[rows, None] * self._groups + titles, self._met)
            todo[rows] = bad
        return drawn

    def check(
        self, user: np.ndarray, target: np.ndarray, number: int, beside: np.ndarray | None = None
    ) -> None:
        """Are there ``number`` items to draw for each of the given users and targets?

        Args:
            beside: titles that are taken already, ``[len(user), m]``, none of them twice.

        Raises:
            UserError: for some user there are fewer.
        """
        title = self.catalogue.group[target]
        pool = self._left[user] - (
            self._drawable[title] & ~_is_in(user * self._groups + title, self._met)
        )
        if beside is not None:
            pool = pool - self._drawable[beside].sum(1)
        if len(pool) and pool.min() < number:
            raise UserError(
                f"{self.setting} asks for {number} negatives of distinct titles, but for user "
                f"{str(self.users[user[pool.argmin()]])!r} only {pool.min()} are left that the "
                f"user has not met; ask for at most {pool.min()}, or leave such users out with "
                "user_inter_num_interval."
            )

    def excluded(self, user: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Negatives.excluded`."""
        first = np.searchsorted(self._met, user * self._groups)
        each = np.searchsorted(self._met, (user + 1) * self._groups) - first
        row = np.repeat(np.arange(len(user)), each)
        title = self._met[np.repeat(first, each) + places(each)] % self._groups
        rows = np.concatenate([row, np.arange(len(user))])
        return rows, np.concatenate([title, self.catalogue.group[target]])

    @cached_property
    def _drawable(self) -> np.ndarray:
        """Which titles can be drawn at all, bool ``[titles]``."""
        popular = self.sampler.distribution == "popularity"
        drawable = np.zeros(self._groups, bool)
        drawable[self.catalogue.group[list(self.sampler.prob) if popular else slice(1, None)]] = (
            True
        )
        return drawable

    @cached_property
    def _left(self) -> np.ndarray:
        """How many titles there are to draw for each user, int64 ``[users]``. Once, for a training
        set draws as often as it has batches."""
        met_user, met_title = np.divmod(self._met, self._groups)
        met = np.bincount(met_user[self._drawable[met_title]], minlength=len(self.users))
        return self._drawable.sum() - met


@dataclass
class MixedNegatives:
    """Draws of several samplers, each of which gives its share.

    Args:
        samplers: by name.
        numbers: by name, how many of the first negatives each gives.
        weights: by name, of those beyond, which a prompt shows.
    """

    samplers: Mapping[str, NegativeSampler]
    numbers: Mapping[str, int]
    weights: Mapping[str, float]

    def draw(
        self, user: np.ndarray, target: np.ndarray, number: int, beside: np.ndarray | None = None
    ) -> np.ndarray:
        """As :meth:`Negatives.draw`; of the first ones, those of the first sampler first."""
        drawn = np.zeros((len(user), 0), np.int64) if beside is None else beside
        before, first = drawn.shape[1], min(number, sum(self.numbers.values()))
        for each in shares(self.numbers, first), shares(self.weights, number - first):
            for name, count in each.items():
                drawn = np.hstack([drawn, self.samplers[name].draw(user, target, count, drawn)])
        return drawn[:, before:]

    def excluded(self, user: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Negatives.excluded`, which is the same for each sampler."""
        return next(iter(self.samplers.values())).excluded(user, target)


def shares(weights: Mapping[str, float], number: int) -> dict[str, int]:
    """``number`` shared out by ``weights``: whole numbers, what is left over to the largest
    remainders, of equal ones to the first."""
    exact = np.array([*weights.values()]) * (number / (sum(weights.values()) or 1))
    whole = np.floor(exact).astype(int)
    over = np.argsort(whole - exact, kind="stable")[: number - whole.sum()]
    whole[over] += 1
    return dict(zip(weights, whole.tolist(), strict=True))


def _is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which ``values`` occur in the sorted array ``ordered``?"""
    if len(ordered) == 0:
        return np.zeros(values.shape, bool)
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[place] == values


def repeats(matrix: np.ndarray) -> np.ndarray:
    """Marks each entry that equals an earlier one of its row."""
    order = np.argsort(matrix, axis=1, kind="stable")
    ranked = np.take_along_axis(matrix, order, 1)
    repeat = np.zeros(matrix.shape, bool)
    np.put_along_axis(repeat, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
    return repeat
