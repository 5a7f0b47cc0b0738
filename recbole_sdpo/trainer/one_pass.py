"""Candidates of a target scored by one pass of a model of RecBole, and not by one for each."""

from __future__ import annotations

from collections.abc import Callable
from logging import getLogger
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.trainer import Trainer
from torch import Tensor

ROUNDING = 1e-4
"""How far two scores may be apart, as a share of the largest of all, and be called equal."""


def with_one_pass(base: type[Trainer]) -> type[Trainer]:
    """``base``, a trainer of RecBole, but that it scores sampled candidates by :class:`OnePass`."""
    parent: Any = base

    class WithOnePass(parent):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.one_pass = OnePass(self.model, super()._neg_sample_batch_eval)

        def _neg_sample_batch_eval(self, batched_data: tuple) -> tuple:
            return self.one_pass(batched_data)

    return WithOnePass


class OnePass:
    """Scores of a batch of sampled candidates.

    RecBole repeats the target's row, and so its history, for each candidate::

        RecBole                         here
        history, candidate 1 -> score   history -> scores of all items, of which those of
        history, candidate 2 -> score              candidates 1, 2, ... are taken
        ...

    The first batch is scored in both ways. A model that has no scores of all items, or other ones,
    is asked for each candidate, as by RecBole.

    Args:
        one_by_one: RecBole's ``_neg_sample_batch_eval``.
    """

    def __init__(self, model: AbstractRecommender, one_by_one: Callable[[tuple], tuple]) -> None:
        self.model, self.one_by_one = model, one_by_one
        self.agrees: bool | None = None

    @torch.no_grad()
    def __call__(self, batch: tuple) -> tuple:
        """What ``one_by_one`` returns: the rows, scores ``[targets, items]`` that are -inf but for
        the candidates, and of each target its row and its item.

        Args:
            batch: rows, the target of each (ascending), and the two that are handed on; without
                candidates the last three are None.
        """
        rows, target, *targets = batch
        if self.agrees is False or target is None:
            return self.one_by_one(batch)
        if self.agrees:
            return rows, self._scores(rows, target), *targets
        expected = self.one_by_one(batch)
        try:
            fault = _apart(self._scores(rows, target), expected[1])
        except Exception as error:  # those of RecBole's models that have none raise all kinds
            fault = f"{type(error).__name__}: {error}"
        self.agrees = not fault
        if fault:
            getLogger().info(
                f"{type(self.model).__name__} scores candidates one by one: its full_sort_predict "
                f"does not give the scores of its predict ({fault})."
            )
        return expected

    def _scores(self, rows: Interaction, target: Tensor) -> Tensor:
        model: Any = self.model
        first = torch.searchsorted(target, torch.arange(int(target[-1]) + 1))
        every = model.full_sort_predict(rows[first].to(model.device)).view(len(first), -1)
        place = target.to(every.device), rows[model.ITEM_ID].to(every.device)
        scores = torch.full_like(every, -torch.inf)
        scores[place] = every[place]
        return scores


def _apart(scores: Tensor, expected: Tensor) -> str:
    """How scores are not those that are ``expected``, or nothing."""
    if scores.shape != expected.shape:
        return f"of shape {list(scores.shape)}, and not {list(expected.shape)}"
    asked = expected.isfinite()
    apart = (scores[asked] - expected[asked]).abs().max()
    return "" if apart <= ROUNDING * expected[asked].abs().max() else f"{apart:.2g} apart"
