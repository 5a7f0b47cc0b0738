"""The whole catalogue as candidates: each target on its own, among what its user has not met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.sampler.sampler import AbstractSampler
from recbole.utils import ModelType

from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.sequences import met_items, users_and_targets
from recbole_sdpo.data.split_rows import distinct
from recbole_sdpo.errors import UserError
from recbole_sdpo.ragged import Ragged

LEFT_OUT = "left_out"
"""Column of an evaluation batch: how many items are no candidates of the row's target."""

SCORES_AT_ONCE = 2**22
"""Scores of a model that knows no sequence in a batch, at least. RecBole takes ``eval_batch_size``
of them, which by default are those of one or two users."""

SCORES_AT_MOST = 2**26
"""Scores of a sequential model in a batch, at most. RecBole takes ``eval_batch_size`` users,
whatever the number of items, and needs several times the memory of their scores."""


class CatalogueEvalDataLoader(FullSortEvalDataLoader):
    """RecBole's loader of the whole catalogue, but that each target is ranked on its own for every
    kind of model, as RecBole does for sequential models alone."""

    def __init__(
        self, config: Config, dataset: Dataset, sampler: AbstractSampler, shuffle: bool = False
    ) -> None:
        self.sample_size = len(dataset)
        # RecBole's own would group the rows of a model that knows no sequence by user.
        AbstractDataLoader.__init__(self, config, dataset, sampler, shuffle=shuffle)

    def _init_batch_size_and_step(self) -> None:
        self.is_sequential = self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        super()._init_batch_size_and_step()
        items = self._dataset.item_num
        if self.is_sequential:
            self.step: int = min(self.step, max(1, SCORES_AT_MOST // items))
            self.set_batch_size(self.step)
        else:
            self.step = max(self.step, SCORES_AT_ONCE // items)
            self.set_batch_size(self.step * items)

    def collate_fn(self, index: Sequence[int]) -> tuple:
        """RecBole's tuple: rows, what is left out, and of each target its row and its item."""
        rows = self._dataset.inter_feat[np.asarray(index)]
        target = rows[self._dataset.iid_field]
        if not self.is_sequential:  # RecBole gives them the user alone
            rows = Interaction({self._dataset.uid_field: rows[self._dataset.uid_field]})
        rows = self.transform(self._dataset, self._dataset.join(rows))
        return rows, None, torch.arange(len(rows)), target


class WithoutMet:
    """Takes the place of a full ranking's collate function, and leaves out what each user has met.

    RecBole does so for models that know no sequence, and not for sequential ones.

    Args:
        loader: which collates rows with a target each.
        met: for each user, the items to leave out.
    """

    def __init__(self, loader: FullSortEvalDataLoader, met: Ragged) -> None:
        self._collate, self._user, self._met = loader.collate_fn, loader._dataset.uid_field, met

    def __call__(self, index: Sequence[int]) -> tuple:
        rows, _, row, target = self._collate(index)
        out = self.left_out(rows[self._user].numpy(), target.numpy())
        rows.update(Interaction({LEFT_OUT: torch.from_numpy(out.lengths)}))
        places = torch.from_numpy(out.owner), torch.from_numpy(out.values)
        return rows, places, row, target

    def left_out(self, user: np.ndarray, target: np.ndarray) -> Ragged:
        """The items that are no candidates of the given targets; a target always is its own."""
        met = self._met.take(user)
        others = met.values != target[met.owner]
        return Ragged.grouped(met.values[others], met.owner[others], len(met))


def check_length_of_lists(loader: FullSortEvalDataLoader, longest: int) -> None:
    """Has each user of ``loader`` so many items to get as a list is long?

    Raises:
        UserError: one has fewer, so that lists would hold items that are no candidates.
    """
    if not isinstance(loader.collate_fn, WithoutMet):
        return
    dataset = loader._dataset
    user, target = users_and_targets(dataset)
    left = dataset.item_num - 1 - loader.collate_fn.left_out(user, target).lengths
    if len(left) and left.min() < longest:
        raise UserError(
            f"topk asks for lists of {longest} items, but for user "
            f"{str(dataset.field2id_token[dataset.uid_field][user[left.argmin()]])!r} only "
            f"{left.min()} are left that the user has not met; metrics of lists need a topk of at "
            f"most {left.min()}, or candidates_exclude_history=False."
        )


def items_of_met_titles(parts: Sequence[Dataset], catalogue: Catalogue) -> Ragged:
    """For each user, all items of the titles that the user has met in the given parts of a
    split."""
    users, items = met_items(*parts)
    users, titles = distinct(np.stack([users, catalogue.group[items]]))
    of_title = Ragged.grouped(np.arange(len(catalogue.group)), catalogue.group)
    return of_title.take(titles).join(np.bincount(users, minlength=parts[0].user_num))
