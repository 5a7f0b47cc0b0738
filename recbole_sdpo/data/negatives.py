"""Negatives from RecBole's samplers: distinct, of distinct titles, and never an item that the
user has met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from recbole.sampler.sampler import AbstractSampler

from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.errors import UserError
from recbole_sdpo.ragged import places

ROUNDS = 1000
"""How often the sampler proposes anew, before what is left is drawn from what may be drawn alone:
where nearly all of its weight is on what a user has met, it would propose for ever."""

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
        for _ in range(ROUNDS):
            if not todo.any():
                break
            drawn[todo] = self.sampler.sampling(int(todo.sum()))
            rows = np.flatnonzero(todo.any(1))
            titles = group[drawn[rows]]
            # RecBole's alias table can give -1 where rounding leaves an item without a partner.
            bad = (drawn[rows] < 1) | (titles == group[target[rows], None])
            bad |= repeats(np.hstack([others[rows], titles]))[:, others.shape[1] :]
            bad |= is_in(user[rows, None] * self._groups + titles, self._met)
            todo[rows] = bad
        for row in np.flatnonzero(todo.any(1)):
            _, excluded = self.excluded(user[[row]], target[[row]])
            taken = [*excluded, *others[row], *group[drawn[row, ~todo[row]]]]
            drawn[row, todo[row]] = self._without(taken)[: todo[row].sum()]
        return drawn

    def _without(self, taken: Sequence[int]) -> np.ndarray:
        """Items of titles other than ``taken`` and each other's, in an order in which the sampler
        would propose them: Gumbel's noise on log-probabilities."""
        group = self.catalogue.group
        out = np.isin(group, taken)
        lots = np.where(out, -np.inf, self._log_p + np.random.gumbel(size=len(group)))
        order = np.argsort(-lots)[: int(np.isfinite(lots).sum())]
        return order[np.sort(np.unique(group[order], return_index=True)[1])]

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
            self._drawable[title] & ~is_in(user * self._groups + title, self._met)
        )
        if beside is not None:
            pool = pool - self._drawable[beside].sum(1)
        if len(pool) and pool.min() < number:
            raise UserError(
                f"{self.setting} asks for {number} negatives of distinct titles, but for user "
                f"{str(self.users[user[pool.argmin()]])!r} only {pool.min()} may be drawn; ask "
                f"for at most {pool.min()}, or leave such users out with user_inter_num_interval."
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
    def _log_p(self) -> np.ndarray:
        """How likely the sampler is to propose each item, float64 ``[items]``, but for a constant.

        Of the alias method (Walker, 1977), which RecBole has: of each item a share stays its own,
        and another item gets the rest.
        """
        p = np.zeros(len(self.catalogue.group))
        if self.sampler.distribution != "popularity":
            p[1:] = 1
        else:
            for item, own in self.sampler.prob.items():
                p[item] += own
                p[max(self.sampler.alias[item], 0)] += 1 - own
        p[0] = 0
        with np.errstate(divide="ignore"):
            return np.log(p)

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


def is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
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
