"""The data of a checkpoint as they are now: whom it can serve, and what it can recommend."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from recbole.data.dataset import SequentialDataset


class ServedDataset(SequentialDataset):
    """RecBole's dataset, but that a user need not have so many events as training asks for, and an
    item none.

    Filters that say which events count, and which items, hold as in training.
    ``user_inter_num_interval`` only says of whom a model can learn: it counts in how many events an
    item has, and leaves nobody out here.

    Attributes:
        users_left_out: for each user whose events a filter leaves out, its name.
        items_left_out: the items that ``item_inter_num_interval`` leaves out.
    """

    inter_feat: pd.DataFrame

    def _get_preset(self) -> None:
        super()._get_preset()
        self.users_left_out: dict[str, str] = {}
        self.items_left_out: set[str] = set()

    def _data_filtering(self) -> None:
        self._filter_nan_user_or_item()
        self._remove_duplication()
        for key, step in (
            ("val_interval", self._filter_by_field_value),
            ("filter_inter_by_user_or_item", self._filter_inter_by_user_or_item),
            ("item_inter_num_interval", self._filter_by_inter_num),
        ):
            before = self.inter_feat[self.uid_field].unique()
            step()
            self.users_left_out |= dict.fromkeys(
                set(before) - set(self.inter_feat[self.uid_field]), key
            )
        self._reset_index()

    def _filter_by_inter_num(self) -> None:
        events = self.inter_feat.copy()
        super()._filter_by_inter_num()
        self.inter_feat = events[~events[self.iid_field].isin(self.items_left_out)]

    def _get_illegal_ids_by_inter_num(
        self, field: str, *args: object, **kwargs: object
    ) -> set[str]:
        illegal = super()._get_illegal_ids_by_inter_num(field, *args, **kwargs)
        if field == self.iid_field:
            self.items_left_out |= illegal
        return illegal

    def add_items(self, tokens: Iterable[str]) -> None:
        """Number the items of the ``.item`` file that have no event, after those that have,
        unless a filter leaves them out."""
        interval = self._parse_intervals_str(self.config["item_inter_num_interval"])
        if self.item_feat is not None or (interval and not self._within_intervals(0, interval)):
            # RecBole has numbered and filtered the items of the file, or wants events of each
            return
        numbered = self.field2id_token[self.iid_field]
        known = {*numbered, *self.items_left_out, ""}
        self.field2id_token[self.iid_field] = np.append(
            numbered, [token for token in tokens if token not in known]
        )
