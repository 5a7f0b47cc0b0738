"""Candidates of a target scored by one pass of a sequential model of RecBole, and not by one for
each."""

from __future__ import annotations

from collections.abc import Callable
from logging import getLogger
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender, SequentialRecommender
from torch import Tensor

from recbole_sdpo.data.whole_catalogue import SCORES_AT_ONCE

ROUNDING = 1e-4
"""How far two scores may be apart, as a share of all scores' spread, and be called equal."""


class OnePass:
    """Scores of a batch of sampled candidates.

    RecBole repeats the target's row, and so its history, for each candidate::

        RecBole                         here
        history, candidate 1 -> score   history -> scores of all items, of which those of
        history, candidate 2 -> score              candidates 1, 2, ... are taken
        ...

    The first batch that can tell is scored in both ways. Where the scores differ, or the model
    cannot score all items, it is asked for each candidate, as by RecBole. So are models that know
    no sequence: they gain little, and some keep scores of all items that outlive their weights.

    Args:
        one_by_one: RecBole's ``_neg_sample_batch_eval``.

    Attributes:
        agrees: are the scores of both ways the same? None before that is known.
    """

    def __init__(self, model: AbstractRecommender, one_by_one: Callable[[tuple], tuple]) -> None:
        self.model, self.one_by_one = model, one_by_one
        self.agrees = None if isinstance(model, SequentialRecommender) else False

    @torch.no_grad()
    def __call__(self, batch: tuple) -> tuple:
        """What ``one_by_one`` returns: the rows, scores ``[targets, items]`` that are -inf but for
        the candidates, and of each target its row and its item.

        Args:
            batch: rows, the target of each (ascending from 0), and the two that are handed on;
                without candidates the last three are None.
        """
        rows, target, *targets = batch
        if self.agrees is False or target is None:
            return self.one_by_one(batch)
        try:
            scores, fault = self._scores(rows, target), ""
        except Exception as error:  # models that cannot score all items raise all kinds
            scores, fault = None, f"{type(error).__name__}: {error}"
        if self.agrees and scores is not None:
            return rows, scores, *targets
        expected = self.one_by_one(batch)
        if scores is not None:
            fault = self._compare(scores, expected[1])
        if fault:
            self.agrees = False
            getLogger().info(
                f"{type(self.model).__name__} scores candidates one by one: its full_sort_predict "
                f"does not give the scores of its predict ({fault})."
            )
        return expected

    def _compare(self, scores: Tensor, expected: Tensor) -> str:
        """How scores are not those that are ``expected``, or nothing; sets :attr:`agrees` where
        they are and could tell."""
        if scores.shape != expected.shape:
            return f"of shape {list(scores.shape)}, and not {list(expected.shape)}"
        asked = expected.isfinite()
        theirs = expected[asked]
        # Of one target, or equal scores, rows that are swapped would not be seen.
        if len(scores) < 2 or not len(theirs) or not (spread := theirs.max() - theirs.min()) > 0:
            return ""
        apart = (scores[asked] - theirs).abs().max()
        self.agrees = bool(apart <= ROUNDING * spread)
        return "" if self.agrees else f"{apart:.2g} apart, of a spread of {spread:.2g}"

    def _scores(self, rows: Interaction, target: Tensor) -> Tensor:
        model: Any = self.model
        first = torch.searchsorted(target, torch.arange(int(target[-1]) + 1))
        every = torch.cat(
            [
                model.full_sort_predict(rows[some].to(model.device)).view(len(some), -1)
                for some in first.split(max(1, SCORES_AT_ONCE // model.n_items))
            ]
        )
        place = target.to(every.device), rows[model.ITEM_ID].to(every.device)
        scores = torch.full(every.shape, -torch.inf, device=every.device)
        scores[place] = every[place].float()
        return scores
