"""Training batches: prompts, and for each target the items to score, the target first and its
negatives after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from recbole.data.dataset import Dataset

from recbole_sdpo.data.negatives import Negatives
from recbole_sdpo.data.prompts import Prompts, Units, candidate_prompts, history_windows
from recbole_sdpo.data.ratings import ratings
from recbole_sdpo.data.sequences import (
    histories,
    target_rows,
    training_sequences,
    users_and_targets,
)
from recbole_sdpo.ragged import Ragged, segment_sums
from recbole_sdpo.random import generator, recbole_draws

TREES_AT_ONCE = 1024
"""Trees for whose targets the policy's own negatives are sought at a time: what is excluded is all
that the user of each target has met."""


class Examples(Protocol):
    """What a stage trains on, cut into trees.

    Attributes:
        targets: int64 ``[trees]``, how many targets each tree serves.
        ratings: float32, what each user gave to the target, one for each target, tree by tree; or
            None.
    """

    targets: np.ndarray
    ratings: np.ndarray | None

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        """About how many tokens each tree takes, int64 ``[trees]``; ``lengths`` are the tokens
        of each unit."""

    def batch(
        self, trees: np.ndarray, seed: int, *purpose: str | int
    ) -> tuple[Prompts, np.ndarray]:
        """The prompts of ``trees`` and the items to score, ``[T, 1 + K]``; what is drawn depends
        on seed and purpose."""


Favourites = Callable[[Prompts, tuple[np.ndarray, np.ndarray]], np.ndarray]
"""From prompts, and what is :meth:`Negatives.excluded` after each, to the items that the policy
ranks highest, int64 ``[T, own]``."""


@dataclass
class HistoryExamples:
    """``history`` style: windows over whole sequences, in which every title is a target.

    Args:
        dataset: RecBole's training dataset.
        window: titles in a window.
        units: of the prompts.
        sampler: of the negatives.
        negatives: K, 0 for none.
        own: how many of them are the policy's own, which come first.

    Attributes:
        favourites: int64 ``[targets, own]``, the policy's own for each target, to be renewed as it
            learns; None until then.
    """

    dataset: Dataset
    window: int
    units: Units
    sampler: Negatives | None
    negatives: int
    own: int = 0

    def __post_init__(self) -> None:
        self.favourites: np.ndarray | None = None
        self.prompts = history_windows(
            training_sequences(self.dataset), self.window, self.units.header
        )
        self.targets = np.bincount(self.prompts.tree, minlength=len(self.prompts))
        # Windows have a sequence's targets in order, each once.
        self.ratings = ratings(self.dataset, target_rows(self.dataset))

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        trunk = segment_sums(lengths[self.prompts.trunks.values], self.prompts.trunks.lengths)
        if self.sampler is None or not self.negatives:
            return trunk
        branch = _negative_length(self.sampler, self.prompts.user, self.prompts.target, lengths) - 1
        return (trunk + self.targets * self.negatives * branch).astype(np.int64)

    def renew(self, trees: np.ndarray, favourites: Favourites) -> None:
        """Ask for the policy's own negatives of the targets of ``trees``, which alone are to be
        drawn then."""
        assert self.sampler is not None
        self.favourites = np.zeros((len(self.prompts.target), self.own), np.int64)
        for first in range(0, len(trees), TREES_AT_ONCE):
            some = trees[first : first + TREES_AT_ONCE]
            prompts = self.prompts.select(some)
            own = favourites(prompts, self.sampler.excluded(prompts.user, prompts.target))
            self.favourites[self.prompts.target_index(some)] = own

    def batch(
        self, trees: np.ndarray, seed: int, *purpose: str | int
    ) -> tuple[Prompts, np.ndarray]:
        prompts = self.prompts.select(trees)
        user, target = prompts.user, prompts.target
        if self.sampler is None or not self.negatives:
            return prompts, target[:, None]
        own = np.zeros((len(target), 0), np.int64)
        if self.favourites is not None:
            own = self.favourites[self.prompts.target_index(trees)]
        with recbole_draws(seed, "negatives", *purpose):
            drawn = self.sampler.draw(user, target, self.negatives - own.shape[1], own)
        return prompts, np.hstack([target[:, None], own, drawn])


@dataclass
class CandidateExamples:
    """``candidates`` style: a prompt for each target, with the candidates in its text; the
    negatives are among them.

    Args:
        candidates: how many stand in the text, the target included.
    """

    dataset: Dataset
    candidates: int
    units: Units
    sampler: Negatives
    negatives: int

    def __post_init__(self) -> None:
        self.histories = histories(self.dataset.inter_feat, self.dataset.config)
        self.user, self.target = users_and_targets(self.dataset)
        self.targets = np.ones(len(self.target), np.int64)
        self.ratings = ratings(self.dataset, np.arange(len(self.target)))

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        title = _negative_length(self.sampler, self.user, self.target, lengths)
        history = segment_sums(lengths[self.histories.values], self.histories.lengths)
        template = np.mean(
            [
                lengths[[part for part in template if not isinstance(part, str)]].sum()
                for template in self.units.templates
            ]
        )
        return (history + (self.candidates + self.negatives) * title + template).astype(np.int64)

    def batch(
        self, trees: np.ndarray, seed: int, *purpose: str | int
    ) -> tuple[Prompts, np.ndarray]:
        user, target = self.user[trees], self.target[trees]
        with recbole_draws(seed, "negatives", *purpose):
            drawn = self.sampler.draw(user, target, self.candidates - 1)
        shown = generator(seed, "order", *purpose).permuted(
            np.concatenate([target[:, None], drawn], axis=1), axis=1
        )
        template = generator(seed, "templates", *purpose).integers(
            len(self.units.templates), size=len(trees)
        )
        prompts = candidate_prompts(
            self.histories.take(trees),
            Ragged.from_matrix(shown),
            target,
            user,
            self.units,
            template,
        )
        return prompts, np.concatenate([target[:, None], drawn[:, : self.negatives]], axis=1)


class FixedExamples:
    """Examples whose negatives and prompts are drawn once and stay.

    Attributes:
        prompts, items: all of them, as :meth:`batch` gives them for some trees.
    """

    def __init__(self, examples: Examples, seed: int) -> None:
        self._examples, self.targets = examples, examples.targets
        self.ratings = examples.ratings
        self.prompts, self.items = examples.batch(np.arange(len(self.targets)), seed, "fixed")

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        return self._examples.sizes(lengths)

    def batch(
        self, trees: np.ndarray, seed: int, *purpose: str | int
    ) -> tuple[Prompts, np.ndarray]:
        return self.prompts.select(trees), self.items[self.prompts.target_index(trees)]


def _negative_length(
    sampler: Negatives, user: np.ndarray, target: np.ndarray, lengths: np.ndarray
) -> float:
    """Mean tokens of a negative's title, from one for each of some targets; what users have not
    met is often long and rare."""
    some = np.linspace(0, len(user) - 1, min(len(user), 2000)).astype(np.int64)
    with recbole_draws(0, "sizes"):
        return float(lengths[sampler.draw(user[some], target[some], 1)].mean())
