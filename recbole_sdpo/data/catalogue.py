"""The titles of the items."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from logging import getLogger
from pathlib import Path

import numpy as np
import pandas as pd
from recbole.data.dataset import Dataset

from recbole_sdpo.data.tables import read_table
from recbole_sdpo.errors import UserError

# Articles that catalogues move behind the title: "Godfather, The", "Enfants du paradis, Les
# (Children of Paradise)".
ARTICLE = re.compile(
    r"^(?P<rest>.+), "
    r"(?P<article>The|A|An|Les|Le|La|L'|Il|Lo|I|Gli|El|Los|Las|Der|Die|Das|Det|Den|De)(?= \(|$)"
)

LONGEST_TITLE = 2000
"""Characters of a title at most: what is longer is a fault in the data, and costs memory for each
other title, too."""


class NoTitles(UserError):
    """There is no file of titles, or not the column: what only a model that reads titles cannot
    do without."""


def folded(text: str) -> str:
    """``text`` without what makes no difference between titles: case, the kind and number of
    blanks, and compatible forms of characters (Unicode NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Catalogue:
    """Titles by RecBole's internal item id.

    Attributes:
        titles: a title for each item; id 0 is RecBole's padding and has an empty one.
        untitled: int64, the ids whose ``.item`` row was missing or empty; their title is ``"item
            <token>"``.
        written: the same titles in other forms, empty where there is none: the first field as it
            stands in the file, and all fields with the article where it stands.
    """

    titles: tuple[str, ...]
    untitled: np.ndarray
    written: tuple[tuple[str, ...], ...] = ()

    @cached_property
    def group(self) -> np.ndarray:
        """int64 ``[items]``: items of one title, :func:`folded`, have one number. Padding has
        number 0, alone."""
        _, inverse = np.unique(
            np.array([folded(title) for title in self.titles[1:]], dtype=object),
            return_inverse=True,
        )
        return np.concatenate([[0], inverse + 1]).astype(np.int64)

    @property
    def shared(self) -> int:
        """How many titles more than one item carries."""
        return int((np.bincount(self.group)[1:] > 1).sum())

    def describe(self) -> str:
        """One line for the log: how many items, how many without a title, how many titles
        shared."""
        return (
            f"{len(self.titles) - 1} items; {len(self.untitled)} without a title, called 'item "
            f"<id>'; {self.shared} titles shared by several items (case and blanks aside), which "
            "never meet in one candidate set that is drawn, nor, where all items are ranked, count "
            "against each other"
        )

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, fields: Sequence[str], article_first: bool = True
    ) -> Catalogue:
        """Read the titles of ``dataset``'s items from its ``.item`` file.

        The file is read here and not through RecBole's ``load_col``, which would filter
        interactions and hand the fields to models that use every loaded feature: the data of the
        baselines stays as it is.

        Args:
            fields: columns that make up a title. What follows the first goes in parentheses: "Alien
                (1979)".
            article_first: read "Godfather, The" as "The Godfather".

        Raises:
            NoTitles: there is no ``.item`` file, or it lacks one of ``fields``.
            UserError: the file is not as an atomic file must be.
        """
        frame = read_items(dataset, fields)
        parts = frame.apply(lambda column: column.str.split().str.join(" "))
        first, others = parts[fields[0]], [parts[field] for field in fields[1:]]
        names = _joined(first.map(_article_first) if article_first else first, others)
        by_token = names[names.ne("")].to_dict()
        tokens = dataset.field2id_token[dataset.iid_field]
        titles = tuple(by_token.get(token, f"item {token}") for token in tokens[1:])
        untitled = np.flatnonzero([token not in by_token for token in tokens[1:]]) + 1
        written = tuple(
            ("", *form.reindex(tokens[1:], fill_value=""))
            for form in (first, _joined(first, others))
        )
        return cls(("", *titles), untitled, written)

    @classmethod
    def without_titles(cls, dataset: Dataset) -> Catalogue:
        """Every item a title of its own, for a baseline on data that has none."""
        tokens = dataset.field2id_token[dataset.iid_field]
        return cls(("", *(f"item {token}" for token in tokens[1:])), np.arange(1, len(tokens)))


def _joined(names: pd.Series, others: Sequence[pd.Series]) -> pd.Series:
    """``names`` with what else makes a title in parentheses."""
    for other in others:
        names = names.where(other.eq("") | names.eq(""), names + " (" + other + ")")
    return names


def _article_first(title: str) -> str:
    match = ARTICLE.match(title)
    if match is None:
        return title
    article = match["article"]
    return (
        f"{article}{'' if article.endswith(chr(39)) else ' '}{match['rest']}{title[match.end() :]}"
    )


def read_items(dataset: Dataset, fields: Sequence[str]) -> pd.DataFrame:
    """The wanted columns of the ``.item`` file as text, by the item's id in the data; of several
    rows of one item the first.

    Raises:
        UserError: the file cannot be read, or is not there, or lacks a column (then ``NoTitles``).
    """
    path = Path(dataset.dataset_path, f"{dataset.dataset_name}.item")
    if not path.is_file():
        raise NoTitles(
            f"title_fields={list(fields)} needs the file {path}, which does not exist; it is a "
            "RecBole atomic file with "
            f"the columns {dataset.iid_field}:token and, for each title field, <field>:token_seq."
        )
    table = read_table(path, dataset.config["field_separator"], dataset.config["encoding"])
    missing = [field for field in (dataset.iid_field, *fields) if field not in table.types]
    if missing:
        valid = ", ".join(sorted(set(table.types) - {dataset.iid_field}))
        raise NoTitles(
            f"title_fields={list(fields)}: {path} has no column {missing[0]!r}; it must be one of "
            f"{valid or 'none'}."
        )
    for field in fields:
        table.check_quotes(field)
    frame = pd.DataFrame(
        {field: table.text(field) for field in fields}, index=table.ids(dataset.iid_field)
    )
    first = ~frame.index.duplicated()
    differs = ~first & (frame.to_numpy() != frame[first].loc[frame.index].to_numpy()).any(1)
    if differs.any():
        row = int(differs.argmax())
        getLogger().warning(
            f"{table.at(row, fields[0])}: item {frame.index[row]!r} has another title in an "
            f"earlier line, which counts ({differs.sum():,} such lines)."
        )
    return frame[first]
