"""Users' sequences, put together again from RecBole's augmented rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction

from recbole_sdpo.data.split_rows import distinct
from recbole_sdpo.ragged import Ragged, places
from recbole_sdpo.settings import LEAVE_ONE_OUT

ROWS_AT_ONCE = 2**20
"""Rows whose histories are looked through at a time: together they hold each event as many times as
a history has items."""


@dataclass(frozen=True)
class Sequences:
    """Item sequences and which of their items are training targets.

    Attributes:
        items: a row of item ids for each sequence, oldest first.
        user: int64 ``[sequences]``, the user of each.
        history: int64 ``[sequences]``, how many items open the sequence without being targets; all
            others are.
    """

    items: Ragged
    user: np.ndarray
    history: np.ndarray


def users_and_targets(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The user and the item of each row, int64 ``[rows]`` each."""
    rows = dataset.inter_feat
    return rows[dataset.uid_field].numpy(), rows[dataset.iid_field].numpy()


def digest_of_targets(dataset: Dataset) -> str:
    """sha256 of who has met what in the rows of ``dataset``, in the data's own ids. Users and items
    without a row do not count."""
    digest = hashlib.sha256()
    for field, ids in zip(
        (dataset.uid_field, dataset.iid_field), users_and_targets(dataset), strict=True
    ):
        there, place = np.unique(ids, return_inverse=True)
        digest.update("\n".join(map(str, dataset.field2id_token[field][there])).encode())
        digest.update(place.astype(np.int64).tobytes())
    return digest.hexdigest()


def histories(rows: Interaction, config: Config) -> Ragged:
    """The item lists of RecBole's rows (a dataset's ``inter_feat``, or a batch), without their
    padding."""
    lists = rows[config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]].cpu().numpy()
    lengths = rows[config["ITEM_LIST_LENGTH_FIELD"]].cpu().numpy().astype(np.int64)
    items = lists[np.arange(lists.shape[1]) < lengths[:, None]]
    return Ragged(items.astype(np.int64, copy=False), lengths)


def training_sequences(dataset: Dataset) -> Sequences:
    """Chain the rows (history, target) of a sequential dataset: a row that continues the one before
    it extends its sequence.

    RecBole makes a row of each target with its history cut to ``MAX_ITEM_LIST_LENGTH``; this undoes
    it, so that one pass over a sequence serves all its targets. Rows that continue nothing start a
    sequence of their own.
    """
    rows = dataset.inter_feat[target_rows(dataset)]
    user = rows[dataset.uid_field].numpy()
    past, target = histories(rows, dataset.config), rows[dataset.iid_field].numpy()
    if len(target) == 0:
        return Sequences(Ragged.from_rows([]), user, np.empty(0, np.int64))
    continues = np.zeros(len(target), bool)
    continues[1:] = (user[1:] == user[:-1]) & _extends(past, target, dataset.max_item_list_len)
    heads = np.flatnonzero(~continues)
    targets_of = np.diff(np.append(heads, len(target)))
    opening = past.take(heads)
    lengths = opening.lengths + targets_of
    items = np.empty(lengths.sum(), np.int64)
    in_opening = places(lengths) < np.repeat(opening.lengths, lengths)
    items[in_opening], items[~in_opening] = opening.values, target
    return Sequences(Ragged(items, lengths), user[heads], opening.lengths)


def target_rows(dataset: Dataset) -> np.ndarray:
    """The rows of a sequential dataset in the order in which :func:`training_sequences` has their
    targets, int64 ``[rows]``."""
    return np.argsort(dataset.inter_feat[dataset.uid_field].numpy(), kind="stable")


def _extends(past: Ragged, target: np.ndarray, longest: int) -> np.ndarray:
    """Is each row's history the row before's and its target, cut to the ``longest`` last items?
    bool ``[rows - 1]``."""
    before = past.padded(0, longest + 1)
    before[np.arange(len(target)), past.lengths] = target
    full = (past.lengths == longest)[:-1, None]
    expected = np.where(full, before[:-1, 1:], before[:-1, :-1])
    return (expected == past.padded(0, longest)[1:]).all(1)


def last_targets(dataset: Dataset) -> Dataset:
    """``dataset`` with only the last row of each user, the latest that was split off for
    training."""
    user = dataset.inter_feat[dataset.uid_field].numpy()
    _, from_end = np.unique(user[::-1], return_index=True)
    return dataset.copy(dataset.inter_feat[np.sort(len(user) - 1 - from_end)])


FEWEST_EVENTS = {"valid": 4, "test": 3}
"""With leave-one-out, how many events a user must have to get the same targets of a phase under
every kind of model. RecBole splits the rows of a sequential model, which lack a user's first item::

    events    split for BPR                         split for GRU4Rec
    A B C     A: training, B: validation, C: test   A -> B: training, A B -> C: test
    A B       A: training, B: test                  A -> B: training
"""


def asked_alike(dataset: Dataset, phase: str) -> np.ndarray:
    """Which users have :data:`FEWEST_EVENTS`? All, with another split. bool ``[users]``."""
    files = dataset.benchmark_filename_list is not None
    if files or dataset.config["eval_args"]["split"] != LEAVE_ONE_OUT:
        return np.ones(dataset.user_num, bool)
    return dataset.events_of_user >= FEWEST_EVENTS[phase]


def met_items(*datasets: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (user, item) pairs of the given parts of a split, histories included, as two
    int64 arrays.

    A sequential dataset never has a user's first item as a target, only in histories.
    """
    pairs = []
    for dataset in datasets:
        if dataset.benchmark_filename_list is not None:
            pairs.append(dataset.split_rows.met)
            continue
        rows, (user, target) = dataset.inter_feat, users_and_targets(dataset)
        pairs.append(np.stack([user, target]))
        if dataset.iid_field + dataset.config["LIST_SUFFIX"] in rows:
            for first in range(0, len(rows), ROWS_AT_ONCE):
                some = slice(first, first + ROWS_AT_ONCE)
                past = histories(rows[some], dataset.config)
                shown = np.stack([np.repeat(user[some], past.lengths), past.values])
                pairs.append(distinct(shown))
    users, items = distinct(np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1))
    return users, items


def popularity(dataset: Dataset) -> np.ndarray:
    """The number of users who met each item in ``dataset``, int64 ``[items]``."""
    return np.bincount(met_items(dataset)[1], minlength=dataset.item_num)
