"""What a ranking does with equals: items of one title are one answer, of which a ranking leaves out
those that are no target, and of equal scores the lot decides."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector
from recbole.evaluator.collector import DataStruct
from torch import Tensor

from recbole_sdpo.data.candidates import candidates_seed
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.categories import categories
from recbole_sdpo.data.sequences import met_items
from recbole_sdpo.evaluator.lists import GROUPS, popularity_groups
from recbole_sdpo.random import generator


class TitleCollector(Collector):
    """RecBole's, to which items that carry a target's title do not count against it, and which
    ranks items in an order that tells nothing.

    A model that reads titles gives those of one title one score, and which comes first would be
    chance; a user who gets one has got the other. Sampled candidates hold none of them.

    Of other items with equal scores the first is the best. In RecBole their places are items'
    numbers, which follow the file, and so often time, in which targets are late. One lot, the same
    for all models, shuffles the places::

        items     0 1 2 3 4      lot    3 0 4 2 1     the item at each place
                                 place  1 4 3 0 2     the place of each item
    """

    def __init__(self, config: Any, catalogue: Catalogue) -> None:
        super().__init__(config)
        self._group = torch.from_numpy(catalogue.group) if catalogue.shared else None
        rng = generator(candidates_seed(config), "equal scores")
        self._lot = torch.from_numpy(rng.permutation(len(catalogue.group)))
        self._place = self._lot.argsort()

    def data_collect(self, train_data: AbstractDataLoader) -> None:
        """As RecBole's, but that an item's count in training is that of the users who met it, the
        same for every kind of model."""
        super().data_collect(train_data)
        self._train = train_data._dataset
        if self.register.need("data.count_items"):
            self.data_struct.set("data.count_items", dict(enumerate(self._met.tolist()[1:], 1)))
        if self.register.need(GROUPS):
            field = self.config["fairness_groups"]
            groups = (
                popularity_groups(self._counts[1])
                if field in (None, "popularity")
                else categories(self._train, field)
            )
            self.data_struct.set(GROUPS, groups)

    @cached_property
    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        """How many items each user met in training, int64 ``[users]``, and how many users each
        item, ``[items]``."""
        user, item = met_items(self._train)
        return (
            np.bincount(user, minlength=self._train.user_num),
            np.bincount(item, minlength=self._train.item_num),
        )

    @property
    def _met(self) -> Tensor:
        """How many users met each item in training, int64 ``[items]``."""
        return torch.from_numpy(self._counts[1])

    def eval_batch_collect(
        self,
        scores_tensor: Tensor,
        interaction: Interaction,
        positive_u: Tensor,
        positive_i: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """As RecBole's, but that there is no list of items where a user's are a sample; returns by
        place the scores by which it has ranked, ``[rows, items]``, ``positive_i``, and the best,
        ``[rows, max(topk)]``; nothing for RecBole's value metrics, which rank nothing."""
        if positive_u is None:
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
            return None
        if self._group is not None:
            scores_tensor = without_twins(scores_tensor, positive_u, positive_i, self._group)
        scores_tensor = scores_tensor[:, self._lot.to(scores_tensor.device)]
        positive_i = self._place.to(positive_i.device)[positive_i]
        super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
        best = highest(scores_tensor, max(self.topk))
        self._rank_equals(scores_tensor, positive_u, positive_i, best)
        # A ranking of the catalogue has one row for a user, and candidates have one each.
        if "rec.items" in self.data_struct and len(interaction) > len(scores_tensor):
            del self.data_struct["rec.items"]
        return scores_tensor, positive_i, best

    def _rank_equals(self, scores: Tensor, row: Tensor, target: Tensor, best: Tensor) -> None:
        """Puts ``best`` in the place of what RecBole has just kept, which is ``torch.topk``'s."""
        if "rec.items" in self.data_struct:
            self.data_struct.get("rec.items")[-len(best) :] = best
        if "rec.topk" in self.data_struct:
            hit = torch.zeros_like(scores, dtype=torch.int)
            hit[row, target] = 1
            # The last column has the number of targets.
            self.data_struct.get("rec.topk")[-len(best) :, :-1] = hit.gather(1, best)

    def get_data_struct(self) -> DataStruct:
        """As RecBole's, in which lists and scores are of items and not of places."""
        struct = super().get_data_struct()
        if "rec.items" in struct:
            struct.set("rec.items", self._lot[struct.get("rec.items")])
        if "rec.score" in struct and struct.get("rec.score").ndim > 1:
            struct.set("rec.score", struct.get("rec.score")[:, self._place])
        return struct


def highest(scores: Tensor, k: int) -> Tensor:
    """The places of the ``k`` highest of each row of ``scores [rows, items]``, best first and of
    equals the first, int64 ``[rows, k]``.

    ``torch.topk`` takes any of the equals, and others for another ``k``.
    """
    value, place = scores.topk(min(k + 1, scores.shape[1]))
    tied = (value[:, 1:] == value[:, :-1]).any(-1)
    in_order = scores[tied].argsort(dim=-1, descending=True, stable=True)
    place[tied] = in_order[:, : place.shape[1]]
    return place[:, :k]


def without_twins(scores: Tensor, row: Tensor, target: Tensor, group: Tensor) -> Tensor:
    """``scores [rows, items]``, where in each target's row other items of its title are out.

    Those that are targets themselves stay.

    Args:
        row, target: int64 ``[targets]``.
        group: int64 ``[items]``, a number for each title.
    """
    row, target, group = (ids.to(scores.device) for ids in (row, target, group))
    of_target, item = (group == group[target][:, None]).nonzero(as_tuple=True)
    twins = torch.zeros_like(scores, dtype=torch.bool)
    twins[row[of_target], item] = True
    twins[row, target] = False
    return scores.masked_fill(twins, -torch.inf)
