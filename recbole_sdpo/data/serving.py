"""The data of a checkpoint as they are now: whom it can serve, and what it can recommend."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from recbole.data.dataset import Dataset, SequentialDataset


class ServedDataset(SequentialDataset):
    """RecBole's dataset, but that a user need not have so many events as training asks for, and an item none.

    Filters that say which events count, and which items, hold as in training. ``user_inter_num_interval`` only says of whom a
    model can learn: it counts in how many events an item has, and leaves nobody out here.

    Attributes:
        users_left_out: for each user whose events a filter leaves out, its name.
        items_left_out: the items that ``item_inter_num_interval`` leaves out.
    """

    def _get_preset(self) -> None:
        super()._get_preset()
        self.users_left_out: dict[str, str] = {}
        self.items_left_out: set[str] = set()

    def _set_alias(self, alias_name: str, default_value: list) -> None:
        past = self.iid_field + self.config["LIST_SUFFIX"]  # of files that are split already, histories hold items
        super()._set_alias(alias_name, [*default_value, *([past] if alias_name == "item_id" and past in self.field2type else [])])

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
            self.users_left_out |= dict.fromkeys(set(before) - set(self.inter_feat[self.uid_field]), key)
        self._reset_index()

    def _filter_by_inter_num(self) -> None:
        events = self.inter_feat.copy()
        super()._filter_by_inter_num()
        self.inter_feat = events[~events[self.iid_field].isin(self.items_left_out)]

    def _get_illegal_ids_by_inter_num(self, field: str, *args: object, **kwargs: object) -> set[str]:
        illegal = super()._get_illegal_ids_by_inter_num(field, *args, **kwargs)
        if field == self.iid_field:
            self.items_left_out |= illegal
        return illegal

    def add_items(self, tokens: Iterable[str]) -> None:
        """Number the items of the ``.item`` file that have no event, after those that have, unless a filter leaves them out."""
        interval = self._parse_intervals_str(self.config["item_inter_num_interval"])
        if self.item_feat is not None or (interval and not self._within_intervals(0, interval)):
            return  # RecBole has numbered and filtered the items of the file, or wants events of each
        numbered = self.field2id_token[self.iid_field]
        known = {*numbered, *self.items_left_out, ""}
        self.field2id_token[self.iid_field] = np.append(numbered, [token for token in tokens if token not in known])


def user_histories(dataset: Dataset) -> dict[str, np.ndarray]:
    """For each user's id in the data the items met, oldest first, as internal ids int64.

    By time as it is written, not by RecBole's float32; events of one time stand as in the file. Of data that are split already, a
    user's last row shows all that came before.

    Args:
        dataset: not split yet.
    """
    tokens, events, past = dataset.field2id_token[dataset.uid_field], dataset.inter_feat, dataset.iid_field + dataset.config["LIST_SUFFIX"]
    if dataset.benchmark_filename_list and past in events:
        last = events.groupby(dataset.uid_field).tail(1)
        rows = zip(last[dataset.uid_field], last[past], last[dataset.iid_field], strict=True)
        return {tokens[user]: np.append(items, item).astype(np.int64) for user, items, item in rows}
    if dataset.time_field in events:
        events = events.sort_values(dataset.time_field, kind="stable")
    return {tokens[user]: items.to_numpy() for user, items in events.groupby(dataset.uid_field)[dataset.iid_field]}
