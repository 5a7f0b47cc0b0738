"""Published candidate lists: one reader for CSV, JSON and JSON lines."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pandas as pd
from recbole.data.dataset import Dataset

from recbole_sdpo.data.catalogue import Catalogue, folded
from recbole_sdpo.data.json_rows import json_rows, opened
from recbole_sdpo.data.published import PHASES, is_published
from recbole_sdpo.errors import UserError
from recbole_sdpo.values import is_a, shown

KINDS = (".csv", ".json", ".jsonl")
"""How the name of a file of lists ends, but for that of a packed one, such as .csv.gz."""

ROWS_AT_ONCE = 20_000
"""Rows that are looked at together."""

MOST_CANDIDATES = 10_000
"""Of one list."""


@dataclass(frozen=True)
class CandidateLists:
    """Candidate lists in the order of their file.

    A row takes 9 + 4 C bytes, 89 with 20 candidates, and twice as much while the last rows are
    joined; what is read but not joined yet are ``ROWS_AT_ONCE`` rows of text.

    Attributes:
        user: int32 ``[rows]``.
        target: int32 ``[rows]``.
        items: int32 ``[rows, C]``, the target among them, as published.
        phase: int8 ``[rows]``, numbers of :data:`PHASES`.
    """

    user: np.ndarray
    target: np.ndarray
    items: np.ndarray
    phase: np.ndarray

    def __len__(self) -> int:
        return len(self.target)

    def of(self, phase: str) -> CandidateLists:
        """The rows of one phase."""
        return self.take(self.phase == PHASES.index(phase))

    def take(self, rows: np.ndarray) -> CandidateLists:
        """Some of the rows; ``rows`` is a mask, or places."""
        return CandidateLists(
            self.user[rows], self.target[rows], self.items[rows], self.phase[rows]
        )

    def holding_twins(self, catalogue: Catalogue) -> int:
        """How many rows hold another item of their target's title."""
        group, twins = catalogue.group, 0
        for begin in range(0, len(self), ROWS_AT_ONCE):
            some = self.take(np.arange(begin, min(begin + ROWS_AT_ONCE, len(self))))
            alike = group[some.items] == group[some.target][:, None]
            twins += int((alike.sum(1) > 1).sum())
        return twins

    @property
    def negatives(self) -> np.ndarray:
        """The candidates without the target, int32 ``[rows, C - 1]``, in their order."""
        return self.items[self.items != self.target[:, None]].reshape(len(self), -1)


class Numbers:
    """A number for each text that it meets, from 0 in the order of their coming."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def __call__(self, texts: np.ndarray) -> np.ndarray:
        """The numbers of ``texts``, object of any shape, as int32 of that shape."""
        codes, unique = pd.factorize(texts.reshape(-1))
        numbers = [self.of.setdefault(text, len(self.of)) for text in unique]
        return np.array(numbers, np.int32)[codes].reshape(texts.shape)

    def fault(self, text: str) -> str:
        """Never called: no text is unknown."""
        raise KeyError(text)


class KnownUsers:
    """The numbers that RecBole gives the users of a dataset."""

    def __init__(self, dataset: Dataset) -> None:
        self._tokens = pd.Index(dataset.field2id_token[dataset.uid_field][1:])

    def __call__(self, texts: np.ndarray) -> np.ndarray:
        """As :meth:`Numbers.__call__`, but -1 for a text that is no user's id."""
        places = self._tokens.get_indexer(texts.reshape(-1))
        return np.where(places < 0, -1, places + 1).astype(np.int32).reshape(texts.shape)

    def fault(self, text: str) -> str:
        """What is wrong with a text that has no number."""
        return f"user {shown(text)} must be a user's id in the dataset"


class KnownItems:
    """The numbers that RecBole gives the items of a dataset, by id, or else by title."""

    def __init__(self, dataset: Dataset, catalogue: Catalogue) -> None:
        self._tokens = pd.Index(dataset.field2id_token[dataset.iid_field][1:])
        forms = [catalogue.titles[1:], *(form[1:] for form in catalogue.written)]
        names = pd.DataFrame(
            [(folded(name), item) for form in forms for item, name in enumerate(form) if name],
            columns=["name", "item"],
        ).drop_duplicates()
        self._example = catalogue.titles[1]
        shared = names["name"].duplicated(keep=False)
        own, self._shared = names[~shared], frozenset(names["name"][shared])
        self._titles, self._of_title = pd.Index(own["name"]), own["item"].to_numpy()
        # Ids that are the title of another item, such as the film 187.
        ids = [folded(token) for token in self._tokens]
        place = self._titles.get_indexer(ids)
        titled = np.flatnonzero(place >= 0)
        self._both = np.array([text in self._shared for text in ids], bool)
        self._both[titled] = self._of_title[place[titled]] != titled
        self._numbered = any(map(_is_number, self._tokens))
        # Over all calls: is there such a text, and which was the first in doubt?
        self._met = {"id": False, "title": False}
        self._doubt = {"id": "", "title": ""}

    def __call__(self, texts: np.ndarray) -> np.ndarray:
        """As :meth:`KnownUsers.__call__`, also for a title that one item alone has, as models read
        it or as the file has it, whatever its case and blanks.

        Two kinds of text are in doubt: an id that is the title of another item, and where ids are
        numbers, one that is no id but a title, such as the film 2012. The first is taken with ids
        alone, the second with titles alone, in all calls together.
        """
        flat = texts.reshape(-1)
        places = self._tokens.get_indexer(flat)
        unknown = np.flatnonzero(places < 0)
        title = self._titles.get_indexer([folded(text) for text in flat[unknown]])
        ids, names = np.flatnonzero(places >= 0), unknown[title >= 0]
        doubts = {
            "id": ids[self._both[places[ids]]],
            "title": names[np.array([self._may_be_id(text) for text in flat[names]], bool)],
        }
        places[names] = self._of_title[title[title >= 0]]
        self._met["id"] |= len(ids) > 0
        self._met["title"] |= len(names) > 0
        for side, other, rows in (("id", "title", ids), ("title", "id", names)):
            if self._met[other]:
                places[doubts[side]] = -1
            elif len(doubts[side]):
                self._doubt[side] = flat[doubts[side][0]]
            if self._doubt[other]:
                places[rows] = -1
        return np.where(places < 0, -1, places + 1).astype(np.int32).reshape(texts.shape)

    def fault(self, text: str) -> str:
        """What is wrong with a text that has no number."""
        place = self._tokens.get_indexer([text])[0]
        if place >= 0 and self._both[place]:
            return f"{shown(text)} is the id of one item and the title of another; give ids alone"
        if place >= 0:
            doubt = shown(self._doubt["title"])
            return f"{shown(text)} is an item's id, and {doubt} before it is none; give ids alone"
        if folded(text) in self._shared:
            return f"{shown(text)} is the title of several items; give the item's id"
        if folded(text) in self._titles:
            if self._may_be_id(text):
                return f"{shown(text)} is a title and no item's id; give ids alone"
            doubt = shown(self._doubt["id"])
            return (
                f"{shown(text)} is a title, and {doubt} before it the id of one item and the title "
                "of another; give ids alone"
            )
        return (
            f"item {shown(text)} must be an item's id in the dataset, or its title, such as "
            f"{shown(self._example)}"
        )

    def _may_be_id(self, title: str) -> bool:
        return self._numbered and _is_number(title)


def _is_number(text: str) -> bool:
    return text.strip().isdecimal()


Coder = Numbers | KnownUsers | KnownItems


class ListRow(NamedTuple):
    """A row as it is written: its number in the file from 1, and its parts."""

    number: int
    user: Any
    target: Any
    candidates: Sequence[Any]
    phase: Any


def read_lists(file: Path, users: Coder, items: Coder, phase: str = "test") -> CandidateLists:
    """Read a file of candidate lists.

    ``.csv`` has the header ``user,target,candidate_1,…,candidate_N[,phase]``. ``.json`` and
    ``.jsonl`` hold a list of objects, or an object a line, with ``user``, ``target``,
    ``candidates`` and maybe ``phase``, one of :data:`PHASES`. It may be compressed, as ``.csv.gz``.

    Args:
        users, items: give texts their numbers.
        phase: of the rows that name none.

    Raises:
        UserError: the file cannot be read, is of another kind, or is empty.
        UserError: a row lacks a part, or its list differs in length from the first, lacks its
            target or has an item twice; or a user or item is unknown.
        UserError: a pair of user and target is there twice in one phase.
    """
    lists = lists_of(_rows(file, phase), file, users, items)
    if not len(lists):
        raise UserError(f"{file} is empty; it must have a row for each candidate list.")
    return lists


def lists_of(rows: Iterator[ListRow], file: Path, users: Coder, items: Coder) -> CandidateLists:
    """The lists of ``rows``, maybe none, which ``file`` holds; see :func:`read_lists`."""
    parts: list[CandidateLists] = []
    while some := list(islice(rows, ROWS_AT_ONCE)):
        parts.append(_coded(file, some, users, items, parts[0].items.shape[1] if parts else None))
    if not parts:
        none = np.zeros(0, np.int32)
        return CandidateLists(none, none, none.reshape(0, 0), none.astype(np.int8))
    lists = CandidateLists(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("user", "target", "items", "phase")
        )
    )
    _check_pairs(file, lists)
    return lists


def _coded(
    file: Path, rows: list[ListRow], users: Coder, items: Coder, length: int | None
) -> CandidateLists:
    """``rows`` as numbers, checked."""
    length = length or len(rows[0].candidates)

    def refuse(wrong: np.ndarray, why: Callable[[int], str]) -> None:
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(f"{file}, row {rows[row].number}: {why(row)}.")

    lengths = np.array([len(row.candidates) for row in rows])
    refuse(
        lengths != length,
        lambda row: (
            f"{lengths[row]} candidates must be {length}, as in the first row: all lists of a "
            "file are of one length"
        ),
    )
    refuse(
        (lengths < 2) | (lengths > MOST_CANDIDATES),
        lambda row: (
            f"{lengths[row]} candidates must be 2 to {MOST_CANDIDATES:,}, the target among them"
        ),
    )
    refuse(
        np.array([row.phase not in PHASES for row in rows]),
        lambda row: f"phase {shown(rows[row].phase)} must be one of {', '.join(PHASES)}",
    )
    fields = ([row.user, row.target, *row.candidates] for row in rows)
    texts = np.array([[*map(_text, row)] for row in fields], object)
    refuse(
        pd.isna(texts).any(1),
        lambda row: "user, target and candidates must be ids, as text or whole numbers, not blank",
    )
    user, ids = users(texts[:, 0]), items(texts[:, 1:])
    refuse(user < 0, lambda row: users.fault(texts[row, 0]))
    refuse((ids < 0).any(1), lambda row: items.fault(texts[row, 1 + (ids[row] < 0).argmax()]))
    target, candidates = ids[:, 0], ids[:, 1:]
    ordered = np.sort(candidates, 1)
    twice = ordered[:, 1:] == ordered[:, :-1]

    def repeated(row: int) -> str:
        item = ordered[row, 1:][twice[row]][0]
        text = texts[row, 2:][candidates[row] == item][0]
        what = "target" if item == target[row] else "item"
        return f"the {what} {shown(text)} is among the candidates twice; it must be there once"

    refuse(twice.any(1), repeated)
    refuse(
        (candidates != target[:, None]).all(1),
        lambda row: f"the target {shown(texts[row, 1])} must be among the candidates",
    )
    phase = [PHASES.index(row.phase) for row in rows]
    return CandidateLists(user, target, candidates, np.array(phase, np.int8))


def _text(value: Any) -> str | None:
    """An id as text, or None if it is none."""
    if is_a(value, int):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def _check_pairs(file: Path, lists: CandidateLists) -> None:
    """Is each pair of user and target there once in its phase?"""
    each = int(lists.target.max()) + 1
    key = (lists.user.astype(np.int64) * each + lists.target) * len(PHASES) + lists.phase
    order = np.argsort(key, kind="stable")
    again = order[1:][key[order[1:]] == key[order[:-1]]]
    if len(again):
        row = int(again.min())
        first = int((key == key[row]).argmax())
        raise UserError(
            f"{file}, row {row + 1}: row {first + 1} has the same user and target, in the same "
            "phase; give each pair once."
        )


def kind_of(file: Path) -> str:
    """One of :data:`KINDS`, by the file's name.

    Raises:
        UserError: it has another name.
    """
    for end in reversed(file.suffixes):
        if end.lower() in KINDS:
            return end.lower()
    raise UserError(f"{file} must be a file of candidate lists: .csv, .json or .jsonl.")


def _rows(file: Path, phase: str) -> Iterator[ListRow]:
    """The rows of a file, as they are written, of ``phase`` where they name none."""
    if kind_of(file) == ".csv":
        with opened(file) as stream:
            yield from _csv_rows(stream, file, phase)
    else:
        yield from _named(json_rows(file), file, phase)


def _csv_rows(stream: TextIO, file: Path, default: str) -> Iterator[ListRow]:
    reader = csv.reader(stream, strict=True)
    try:
        head = next(reader, [])
        names = [name.strip() for name in head]
        places, times = {name: place for place, name in enumerate(names)}, Counter(names)
        number = sum(re.fullmatch(r"candidate_\d+", name) is not None for name in places)
        wanted = ["user", "target", *(f"candidate_{n + 1}" for n in range(max(number, 2)))]
        known = {*wanted, "phase"}
        for name in [*wanted, *names] if head else ():
            if times[name] != 1 or name not in known:
                raise UserError(
                    f"{file}: column {shown(name)} is "
                    f"{'missing' if name not in places else 'unknown or there twice'}; the header "
                    "must be user,target,candidate_1,candidate_2,… and maybe phase."
                )
        user, target, *candidates = (places.get(name, -1) for name in wanted)
        phase = places.get("phase")
        for row, fields in enumerate((fields for fields in reader if fields), 1):
            if len(fields) != len(head):
                raise UserError(
                    f"{file}, row {row}: {len(fields)} fields must be {len(head)}, as in the "
                    "header."
                )
            yield ListRow(
                row,
                fields[user],
                fields[target],
                [fields[place] for place in candidates if fields[place].strip()],
                fields[phase] if phase is not None else default,
            )
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num} is not CSV: {error}.") from error


def _named(objects: Iterator[Any], file: Path, phase: str) -> Iterator[ListRow]:
    """The parts of each object."""
    for row, item in enumerate(objects, 1):
        where = f"{file}, row {row}"
        if not isinstance(item, Mapping):
            raise UserError(f"{where}: {shown(item)} must be an object.")
        if is_published(item):
            raise UserError(
                f"{where} is of a file without users, as LLaRA has them; recbole-sdpo import makes "
                "a dataset and a candidates file of such files."
            )
        for key in ("user", "target", "candidates"):
            if key not in item:
                raise UserError(f"{where} has no key {key!r}.")
        for key in item.keys() - {"phase"}:  # else its list would count as one of the test
            if key.strip().lower() == "phase":
                raise UserError(f"{where}: the key {key!r} must be 'phase'.")
        if not isinstance(item["candidates"], list):
            raise UserError(f"{where}: candidates={shown(item['candidates'])} must be a list.")
        named = item.get("phase")
        yield ListRow(
            row,
            item["user"],
            item["target"],
            item["candidates"],
            phase if named is None else named,
        )
