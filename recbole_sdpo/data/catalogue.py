"""The titles of the items."""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from recbole.data.dataset import Dataset

from recbole_sdpo.errors import UserError

# Articles that catalogues move behind the title: "Godfather, The", "Enfants du paradis, Les (Children of Paradise)".
ARTICLE = re.compile(r"^(?P<rest>.+), (?P<article>The|A|An|Les|Le|La|L'|Il|Lo|I|Gli|El|Los|Las|Der|Die|Das|Det|Den|De)(?= \(|$)")


def folded(text: str) -> str:
    """``text`` without what makes no difference between titles: case, the kind and number of blanks, and compatible forms of
    characters (Unicode NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Catalogue:
    """Titles by RecBole's internal item id.

    Attributes:
        titles: a title for each item; id 0 is RecBole's padding and has an empty one.
        untitled: int64, the ids whose ``.item`` row was missing or empty; their title is ``"item <token>"``.
    """

    titles: tuple[str, ...]
    untitled: np.ndarray

    @cached_property
    def group(self) -> np.ndarray:
        """int64 ``[items]``: items of one title, :func:`folded`, have one number. Padding has number 0, alone."""
        _, inverse = np.unique(np.array([folded(title) for title in self.titles[1:]], dtype=object), return_inverse=True)
        return np.concatenate([[0], inverse + 1]).astype(np.int64)

    @property
    def shared(self) -> int:
        """How many titles more than one item carries."""
        return int((np.bincount(self.group)[1:] > 1).sum())

    def describe(self) -> str:
        """One line for the log: how many items, how many without a title, how many titles shared."""
        return (
            f"{len(self.titles) - 1} items; {len(self.untitled)} without a title, called 'item <id>'; {self.shared} titles "
            "shared by several items (case and blanks aside), which never meet in one candidate set"
        )

    @classmethod
    def from_dataset(cls, dataset: Dataset, fields: Sequence[str], article_first: bool = True) -> Catalogue:
        """Read the titles of ``dataset``'s items from its ``.item`` file.

        The file is read here and not through RecBole's ``load_col``, which would filter interactions and hand the fields
        to models that use every loaded feature: the data of the baselines stays as it is.

        Args:
            fields: columns that make up a title. What follows the first goes in parentheses: "Alien (1979)".
            article_first: read "Godfather, The" as "The Godfather".

        Raises:
            UserError: there is no ``.item`` file, or it lacks one of ``fields``.
        """
        frame = _read_items(dataset, fields)
        parts = frame.apply(lambda column: column.str.split().str.join(" "))
        names = parts[fields[0]]
        if article_first:
            names = names.map(_article_first)
        for field in fields[1:]:
            names = names.where(parts[field].eq("") | names.eq(""), names + " (" + parts[field] + ")")
        by_token = names[names.ne("")].to_dict()
        tokens = dataset.field2id_token[dataset.iid_field]
        titles = tuple(by_token.get(token, f"item {token}") for token in tokens[1:])
        untitled = np.flatnonzero([token not in by_token for token in tokens[1:]]) + 1
        return cls(("", *titles), untitled)

    @classmethod
    def without_titles(cls, dataset: Dataset) -> Catalogue:
        """Every item a title of its own, for a baseline on data that has none."""
        tokens = dataset.field2id_token[dataset.iid_field]
        return cls(("", *(f"item {token}" for token in tokens[1:])), np.arange(1, len(tokens)))


def _article_first(title: str) -> str:
    match = ARTICLE.match(title)
    if match is None:
        return title
    article = match["article"]
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{match['rest']}{title[match.end() :]}"


def _read_items(dataset: Dataset, fields: Sequence[str]) -> pd.DataFrame:
    """The wanted columns of the ``.item`` file as text, by item token."""
    path = os.path.join(dataset.dataset_path, f"{dataset.dataset_name}.item")
    if not os.path.isfile(path):
        raise UserError(
            f"title_fields={list(fields)} needs the file {path}, which does not exist; it is a RecBole atomic file with "
            f"the columns {dataset.iid_field}:token and, for each title field, <field>:token_seq."
        )
    # Atomic files have no quoting, and "NA" is a title like any other.
    frame = pd.read_csv(
        path,
        sep=dataset.config["field_separator"],
        dtype=str,
        keep_default_na=False,
        quoting=csv.QUOTE_NONE,
        encoding="utf-8-sig",
    )
    frame.columns = [column.split(":")[0] for column in frame.columns]
    missing = [field for field in (dataset.iid_field, *fields) if field not in frame.columns]
    if missing:
        raise UserError(
            f"title_fields={list(fields)}: {path} has no column {missing[0]!r}; valid are "
            f"{', '.join(sorted(set(frame.columns) - {dataset.iid_field}))}."
        )
    return frame.drop_duplicates(dataset.iid_field).set_index(dataset.iid_field)[list(fields)]
