"""RecBole's ``Dataset``, but that files are read as they are written, events stand in their order,
and what is missing is said.

RecBole finds the classes of its models' data by name, so the methods of its own classes are
replaced, for every model and route: :func:`install`.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType, ModelType

from recbole_sdpo.data.candidates import candidates_seed
from recbole_sdpo.data.columns import FILTERS, UNFILTERED, by_time, check_columns, list_field
from recbole_sdpo.data.ratings import RATING, rating_field, read_ratings
from recbole_sdpo.data.sequences import users_and_targets
from recbole_sdpo.data.split_rows import SplitRows, distinct, known_events, strangers, unknown
from recbole_sdpo.data.tables import Table, read_table
from recbole_sdpo.errors import UserError
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.random import generator

PICKLES = ("dataset_save_path", "dataloaders_save_path", "save_dataset", "save_dataloaders")
"""RecBole's settings that load or write a pickle."""


def create_dataset(config: Config) -> Dataset:
    """The dataset that ``config`` asks for, from its files.

    RecBole's function unpickles a file of ``checkpoint_dir`` instead, unasked, if there is one:
    that runs code, and what it holds need not be what the files hold now.

    Raises:
        UserError: a file or a setting of the data is wrong, or a setting asks for a pickle.
    """
    for key in PICKLES:
        if config[key]:
            raise UserError(
                f"{key}={config[key]!r}: a saved dataset of RecBole is a pickle, which runs code "
                "as it is loaded and does not follow its "
                "files; leave the setting out, and the files are read."
            )
    module = importlib.import_module("recbole.data.dataset")
    kinds = {
        ModelType.SEQUENTIAL: "SequentialDataset",
        ModelType.KNOWLEDGE: "KnowledgeBasedDataset",
    }
    kind = getattr(module, f"{config['model']}Dataset", None) or getattr(
        module, kinds.get(config["MODEL_TYPE"], "Dataset")
    )
    return kind(config)


def user_histories(dataset: Dataset) -> dict[str, np.ndarray]:
    """For each user's id in the data the items met, oldest first, as internal ids int64.

    Args:
        dataset: as :func:`create_dataset` makes it, not split yet.
    """
    tokens, events = dataset.field2id_token[dataset.uid_field], dataset.inter_feat
    if dataset.benchmark_filename_list is None:
        events = events.sort_values(dataset.time_field, kind="stable")
        return {
            tokens[user]: items.to_numpy()
            for user, items in events.groupby(dataset.uid_field)[dataset.iid_field]
        }
    met: dict[str, list[int]] = {}
    for user, past, item in zip(
        events[dataset.uid_field],
        events[list_field(dataset.config)],
        events[dataset.iid_field],
        strict=True,
    ):
        history, shown = met.setdefault(tokens[user], []), list(past)
        # A row goes on where an earlier one ended, or shows the end of that, or tells of another
        # session. Where the longest come first, as in files of sessions, the others are parts of
        # it.
        if _holds(history, [*shown, item]):
            continue
        if shown[: len(history)] == history:
            history[:] = shown
        elif history[-len(shown) :] != shown:
            history.extend(shown)
        history.append(item)
    return {user: np.array(items, np.int64) for user, items in met.items()}


def _holds(history: list[int], part: list[int]) -> bool:
    """Do the items of ``part`` stand in ``history`` one after another?"""
    return any(
        history[start : start + len(part)] == part for start in range(len(history) - len(part) + 1)
    )


def install() -> None:
    """Replace the methods of RecBole's ``Dataset``."""
    for method in (
        _load_data,
        _load_feat,
        _set_alias,
        _fill_nan,
        _normalize,
        _remap_ID_all,
        _remove_duplication,
        _reset_index,
        _change_feat_format,
        build,
    ):
        setattr(Dataset, method.__name__, method)


RECBOLE = {
    name: getattr(Dataset, name)
    for name in (
        "_load_data",
        "_set_alias",
        "_normalize",
        "_remap_ID_all",
        "_reset_index",
        "_change_feat_format",
        "build",
    )
}
"""The methods as RecBole has them, which ours call."""


def _load_data(self: Dataset, token: str, dataset_path: str) -> None:
    """As RecBole's, once files and columns are there; RecBole would fetch some datasets from the
    network, and may ask on standard input."""
    check_columns(self.config)
    if self.benchmark_filename_list is not None and "split" in self.config.external_config_dict.get(
        "eval_args", {}
    ):
        getLogger().warning(
            "eval_args.split has no effect on files of benchmark_filename, which are split already."
        )
    RECBOLE["_load_data"](self, token, dataset_path)


def _load_feat(self: Dataset, filepath: str, source: FeatureSource | str) -> pd.DataFrame | None:
    """As RecBole's, by a reader that takes text as it is written.

    RecBole's takes quotes for those of CSV, "NA" for nothing, and a line with fewer fields for one
    that has them.
    """
    load, unload = self._get_load_and_unload_col(source)
    if load == set():
        return None
    table = read_table(Path(filepath), self.config["field_separator"], self.config["encoding"])
    name = source.value if isinstance(source, FeatureSource) else source
    wanted = [
        field
        for field in table.types
        if (load is None or field in load) and field not in (unload or ())
    ]
    columns = {}
    for field in wanted:
        kind = FeatureType(table.types[field])
        if name != "link":
            self.field2source[field], self.field2type[field] = source, kind
            if not kind.value.endswith("seq"):
                self.field2seqlen[field] = 1
            if "float" in kind.value:
                self.field2bucketnum[field] = 2
        columns[field] = _column(self, table, field, name)
    if name == "inter" and (rated := rating_field(self.config)):
        self.field2source[RATING], self.field2type[RATING] = source, FeatureType.FLOAT
        self.field2seqlen[RATING], self.field2bucketnum[RATING] = 1, 2
        columns[RATING] = read_ratings(table, rated)
    if not columns:
        self.logger.warning(f"No columns has been loaded from [{source}]")
        return None
    # As they are: pandas 3 would make its own kind of text of Python's.
    return pd.DataFrame(
        {field: pd.Series(column, dtype=column.dtype) for field, column in columns.items()}
    )


def _column(self: Dataset, table: Table, field: str, source: str) -> Any:
    kind = self.field2type[field] if source != "link" else FeatureType(table.types[field])
    if kind == FeatureType.FLOAT:
        return table.numbers(
            field, needed=source == "inter" and field == self.time_field and by_time(self.config)
        )
    if kind == FeatureType.TOKEN:
        if field in (self.uid_field, self.iid_field):
            return table.ids(field)
        text = table.text(field)
        return np.where(text == "", np.array(np.nan, object), text)
    rows = table.sequences(field, self.config["seq_separator"])
    length, past = max(map(len, rows)), source == "inter" and field == list_field(self.config)
    if past:
        table.refuse(
            np.array([len(row) == 0 for row in rows]),
            field,
            "is no history; it must have one item or more",
        )
    limit = (self.config["seq_len"] or {}).get(field, length)
    if limit < length:
        if past:
            raise UserError(
                f"seq_len={self.config['seq_len']} would cut the end of histories; "
                "MAX_ITEM_LIST_LENGTH cuts their start."
            )
        rows = [row[:limit] for row in rows]
    self.field2seqlen[field] = min(length, limit)
    return pd.Series(rows, dtype=object)


def _set_alias(self: Dataset, alias_name: str, default_value: list) -> None:
    """As RecBole's; the histories of files that are split already hold items, whether or not
    ``alias_of_item_id`` says so."""
    past = list_field(self.config)
    if (
        alias_name == "item_id"
        and self.benchmark_filename_list is not None
        and past in self.field2type
    ):
        default_value = [*default_value, past]
    RECBOLE["_set_alias"](self, alias_name, default_value)


def _fill_nan(self: Dataset) -> None:
    """As RecBole's, which fills a column in place: from pandas 3 on, that fills a copy, and what
    is missing stays so."""
    for name in self.feat_name_list:
        frame = getattr(self, name)
        for field, column in frame.items():
            kind = self.field2type[field]
            if kind in (FeatureType.TOKEN, FeatureType.FLOAT):
                frame[field] = column.fillna(0 if kind == FeatureType.TOKEN else column.mean())
            else:
                nothing = np.empty(0, np.int64 if kind == FeatureType.TOKEN_SEQ else np.float64)
                rows = [nothing if isinstance(row, float) else row for row in column]
                frame[field] = pd.Series(rows, index=frame.index, dtype=object)


def _normalize(self: Dataset) -> None:
    """As RecBole's, but for the ratings that an objective reads."""
    written = self.inter_feat.get(RATING)
    RECBOLE["_normalize"](self)
    if written is not None:
        self.inter_feat[RATING] = written


def _remap_ID_all(self: Dataset) -> None:
    """As RecBole's; then items that are held out lose all events that are no user's last. They
    keep their numbers, so that they stay in the catalogue and among the candidates."""
    RECBOLE["_remap_ID_all"](self)
    share = self.config["held_out_items"]
    if not share:
        return
    events, tokens = self.inter_feat, self.field2id_token[self.iid_field]
    by_name = np.argsort(tokens[1:]) + 1  # whatever comes first in the file
    number = round(share * len(by_name))
    rng = generator(candidates_seed(self.config), "held-out items")
    held_out = rng.choice(by_name, number, replace=False)
    ordered = events.sort_values(self.time_field, kind="stable")
    last = ordered.drop_duplicates(self.uid_field, keep="last").index
    meets, ends = events[self.iid_field].isin(held_out), events.index.isin(last)
    # RecBole trains on the last event of a user who has no three.
    others = events[self.uid_field].map(events[~meets][self.uid_field].value_counts())
    tests = meets & ends & (others >= 2)
    if not tests.any():
        raise UserError(
            f"held_out_items={share} is {number:,} of {len(by_name):,} items, with which no user "
            "ends who has two other events; it must be more."
        )
    getLogger().info(
        f"held_out_items={share}: {number:,} of {len(by_name):,} items; {tests.sum():,} users end "
        f"with one, and {(meets & ~tests).sum():,} other events of theirs are left out"
    )
    self.inter_feat = events[~meets | tests]
    self._reset_index()


def _remove_duplication(self: Dataset) -> None:
    """As RecBole's, but that events of one time stand as in the file; RecBole sorts in a way
    that leaves their order to the processor."""
    keep = self.config["rm_dup_inter"]
    if keep is None:
        return
    if self.time_field in self.inter_feat:
        self.inter_feat = self.inter_feat.sort_values(self.time_field, kind="stable")
    else:
        getLogger().warning(
            f"rm_dup_inter={keep!r} goes by the order in the file: no time is loaded."
        )
    self.inter_feat = self.inter_feat.drop_duplicates([self.uid_field, self.iid_field], keep=keep)


def _reset_index(self: Dataset) -> None:
    """As RecBole's, with an error that names the filters."""
    if any(getattr(self, name).empty for name in self.feat_name_list):
        active = ", ".join(
            f"{key}={self.config[key]!r}"
            for key in FILTERS
            if str(self.config[key]) not in map(str, UNFILTERED)
        )
        raise UserError(
            f"dataset={self.dataset_name!r}: nothing is left after the filters; make them wider "
            f"({active or 'load_col'})."
        )
    RECBOLE["_reset_index"](self)


def _change_feat_format(self: Dataset) -> None:
    """As RecBole's, but that time, by which it sorts, keeps all its digits until :func:`build` has
    split the events.

    RecBole casts it to float32 before it sorts: events of one minute are ties. Reported nowhere
    that we found; dataset.py, line 2204.
    """
    frame, time, sequential = self.inter_feat, self.time_field, isinstance(self, SequentialDataset)
    exact = None
    _check_size(self)
    if by_time(self.config):
        exact = torch.from_numpy(np.array(frame[time].tolist()))
        if frame[time].dtype == np.int64:
            frame[time] = frame[time].astype(np.float64)
        _warn_of_ties(frame[self.uid_field].to_numpy(), exact.view(len(frame), -1)[:, 0].numpy())
    if self.benchmark_filename_list is not None:
        past = list_field(self.config)
        self.histories = (
            list(frame[past]) if past in frame else [np.empty(0, np.int64)] * len(frame)
        )
        if sequential:
            _cut_histories(self)
        elif past in frame:
            # no feature of an event: an event of a history has none
            self._del_col(frame, past)
    with warnings.catch_warnings():
        # From pandas 3 on a column may not be written to; the tensor made of it is all that stays.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        RECBOLE["_change_feat_format"](self)
    if exact is not None:
        self.inter_feat[time] = exact
    if self.benchmark_filename_list is not None and sequential:
        for field, rows in self.inter_feat.interaction.items():
            # RecBole's rows are as wide as the longest history, which some models' need not be
            if rows.ndim == 2:
                self.inter_feat[field] = torch.nn.functional.pad(
                    rows, (0, self.max_item_list_len - rows.shape[1])
                )


def _check_size(self: Dataset) -> None:
    """Remember how many events each user has, and refuse what RecBole stumbles over before it has
    split."""
    self.events_of_user = np.bincount(self.inter_feat[self.uid_field], minlength=self.user_num)
    if self.item_num < 3:
        raise UserError(
            f"dataset={self.dataset_name!r} has one item; it must have two or more, to rank one "
            "above another."
        )
    if (
        self.benchmark_filename_list is None
        and isinstance(self, SequentialDataset)
        and self.events_of_user.max() < 2
    ):
        raise UserError(
            f"dataset={self.dataset_name!r}: each of the {self.user_num - 1:,} users has one "
            "event; there must be four to train, validate and test on one."
        )


def _warn_of_ties(user: np.ndarray, time: np.ndarray) -> None:
    order = np.lexsort((time, user))
    tied = (np.diff(user[order]) == 0) & (np.diff(time[order]) == 0)
    if tied.any():
        users = len(np.unique(user[order][1:][tied]))
        getLogger().warning(
            f"{tied.sum():,} of {len(user):,} events, of {users:,} users, have the time of the one "
            "before them; they stand as in the file."
        )


def _cut_histories(self: Dataset) -> None:
    """Of each history in files that are split already the last ``MAX_ITEM_LIST_LENGTH`` items,
    as where RecBole makes them itself."""
    frame, longest, suffix = self.inter_feat, self.max_item_list_len, self.config["LIST_SUFFIX"]
    for field in [f"{field}{suffix}" for field in frame if f"{field}{suffix}" in frame]:
        frame[field] = pd.Series(
            [row[-longest:] for row in frame[field]], index=frame.index, dtype=object
        )
        self.field2seqlen[field] = longest
    frame[self.item_list_length_field] = frame[self.item_list_length_field].clip(upper=longest)


def build(self: Dataset) -> list[Dataset]:
    """As RecBole's: the parts for training, validation and test, none of which may be empty.

    Raises:
        UserError: there is too little to split.
    """
    parts = RECBOLE["build"](self)
    times = (
        (self.time_field, f"{self.time_field}{self.config['LIST_SUFFIX']}")
        if by_time(self.config)
        else ()
    )
    for dataset in (self, *parts):
        for field in times:
            if field in dataset.inter_feat:
                dataset.inter_feat[field] = dataset.inter_feat[field].float()
    if self.benchmark_filename_list is not None:
        ends = np.cumsum([0, *self.file_size_list])
        for part, (start, end) in zip(parts, pairwise(ends), strict=True):
            user, item = users_and_targets(part)
            part.split_rows = SplitRows(user, Ragged.from_rows(self.histories[start:end]), item)
        if not isinstance(self, SequentialDataset):
            _learn_histories(self, parts)
    _check_parts(self, parts)
    return parts


def _learn_histories(self: Dataset, parts: Sequence[Dataset]) -> None:
    """A model that knows no sequence trains on events, those of histories included."""
    rows = [part.split_rows for part in parts]
    known, train = known_events(*rows), parts[0]
    targets = np.stack([rows[0].user, rows[0].target])
    unseen = len(known.T) - len(distinct(targets).T)
    if not unseen:
        return
    name = self.config["model"]
    if more := set(train.inter_feat.columns) - {self.uid_field, self.iid_field}:
        getLogger().warning(
            f"{name} knows no sequence and trains on the {len(targets.T):,} events of the training "
            f"file; {unseen:,} further ones, which only histories hold, it does not see, for they "
            f"have no {min(more)!r}."
        )
        return
    train.inter_feat = Interaction(
        {
            field: torch.from_numpy(ids)
            for field, ids in zip((self.uid_field, self.iid_field), known)
        }
    )
    getLogger().info(
        f"{name} knows no sequence and trains on {len(known.T):,} events: those of the training "
        "file, and those of histories of validation and test for which no row there asks"
    )
    if count := unknown(known, rows[1:]):
        getLogger().warning(
            f"{name} knows no event of the users of {count:,} of "
            f"{sum(len(part.user) for part in rows[1:]):,} rows of validation and test: rows there "
            "ask for all that their histories hold."
        )


def check_users(model: torch.nn.Module, parts: Sequence[Dataset]) -> None:
    """A sequential model that has a vector for each user must have met the users whom it is asked
    about.

    Args:
        model: of RecBole's, as built for the first of ``parts``.
        parts: for training, validation and test.

    Raises:
        UserError: files that are split already ask about others, as where each row is of a user of
            its own; the vectors of those would be as they were drawn, and those of the others would
            give their targets away in training.
    """
    dataset = parts[0]
    if dataset.benchmark_filename_list is None or not isinstance(dataset, SequentialDataset):
        return
    if not strangers(*(part.split_rows for part in parts)):
        return
    for name, module in model.named_modules():
        size = getattr(module, "num_embeddings", 0)
        if re.search("user|^UI_", name) and size >= dataset.user_num:
            raise UserError(
                f"model={dataset.config['model']!r} learns a vector for each user ({name}), and "
                f"users of {dataset.config['benchmark_filename'][2]!r} have no row of training; "
                "choose a model that knows users by their history, such as SASRec or GRU4Rec."
            )


def _check_parts(self: Dataset, parts: Sequence[Dataset]) -> None:
    split = self.config["eval_args"]["split"]
    numbers = {"valid_only": (0, 1), "test_only": (0, 2)}.get(split.get("LS"), (0, 1, 2))
    for number in numbers if self.benchmark_filename_list is None else ():
        if len(parts[number]) == 0:
            what = ("train", "validate", "test")[number]
            need = "; of each user, it takes four events to have one for each part"
            events = self.events_of_user
            raise UserError(
                f"dataset={self.dataset_name!r}: with eval_args.split={split} there is nothing to "
                f"{what} on, of {events.sum():,} events of {self.user_num - 1:,} users, who have "
                f"{events.max():,} at most{need if 'LS' in split else '; give more events'}."
            )
    if isinstance(self, SequentialDataset):
        return
    pairs = [np.stack(users_and_targets(part)) for part in parts]
    distribution = [
        self.config[f"{phase}_neg_sample_args"]["distribution"]
        for phase in ("train", "valid", "test")
    ]
    if not self.config["repeatable"] and set(distribution) != {"none"}:
        user = distinct(np.concatenate(pairs, axis=1))[0]
        met = np.bincount(user)
        if met.max() >= self.item_num - 1:
            name = self.field2id_token[self.uid_field][met.argmax()]
            raise UserError(
                f"user {str(name)!r} has met all {self.item_num - 1} items, and no negative is "
                "left to draw; leave such users out, with "
                f"user_inter_num_interval='[0,{met.max() - 1}]' or narrower."
            )
