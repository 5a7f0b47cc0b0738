"""Items of one title are one answer: where one is the target, a ranking leaves out the others."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector
from torch import Tensor

from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.categories import categories
from recbole_sdpo.data.sequences import met_items
from recbole_sdpo.evaluator.lists import GROUPS, popularity_groups


class TitleCollector(Collector):
    """RecBole's, to which items that carry a target's title do not count against it.

    A model that reads titles gives them one score, and which comes first would be chance; a user
    who gets one has got the other. Sampled candidates hold none of them.
    """

    def __init__(self, config: Any, catalogue: Catalogue) -> None:
        super().__init__(config)
        self._group = torch.from_numpy(catalogue.group) if catalogue.shared else None

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
    ) -> Tensor:
        """As RecBole's, but that there is no list of items where a user's are a sample; returns the
        scores by which it has ranked."""
        if self._group is not None and positive_u is not None:
            scores_tensor = without_twins(scores_tensor, positive_u, positive_i, self._group)
        super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
        # A ranking of the catalogue has one row for a user, and candidates have one each.
        if "rec.items" in self.data_struct and len(interaction) > len(scores_tensor):
            del self.data_struct["rec.items"]
        return scores_tensor


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
