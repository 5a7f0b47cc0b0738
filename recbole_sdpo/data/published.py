"""Rows with a history and candidates of their own, as papers publish them in JSON, to files of
RecBole that are split already.

What we rely on is what these writers and loaders show:

* S-DPO (github.com/chenyuxin1999/S-DPO: ``data/prepare_sft_data.py``, ``sft.py``,
  ``data/lastfm-sft-cans20``). Each of train, val and test is a JSON list of objects.
  ``historyList`` is a list of titles (MovieLens, Steam) or one text joined by ``::`` (LastFM,
  Goodreads), ``itemList`` a list of 20 titles, ``trueSelection`` one of them. Histories have 3 to
  10 titles. There are no ids, neither of users nor of items.
* LLaRA (github.com/ljy0ustc/LLaRA: ``data/*_data.py``), whose data these are: padding is cut off
  before titles are looked up, and candidates are also joined to one text.
* DynamicPO (github.com/xingyuHuxingyu/DynamicPO) writes and reads the same files.
* RecPO (github.com/HoytWen/RecPO: ``data/prepare_sft_data.py``) adds keys, such as
  ``historyRatingList``, which are ignored here. Its rows of training come shuffled.

One person may have many rows, each of which goes on where another one ended. Nothing says so.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from recbole_sdpo.data.atomic import check_name, without_quote
from recbole_sdpo.data.csv_columns import HALF
from recbole_sdpo.data.json_rows import json_rows
from recbole_sdpo.errors import UserError
from recbole_sdpo.files import new_folder, user_path

PHASES = ("train", "valid", "test")
KEYS = ("historyList", "itemList", "trueSelection")
SEPARATOR = "::"
CANDIDATES = "candidates.jsonl"

SHOWN = 10
"""How many rows of one fault are named by their number."""


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        number: in its file, from 1: among the rows of a list, or of the line.
        history, candidates: titles, oldest first and in the published order; as they are written,
            they may also be one text joined by ``::``.
        target: a title.
    """

    number: int
    history: list[str] | str
    candidates: list[str] | str
    target: str


class Unusable(ValueError):
    """What is wrong with a row: a sentence with a gap, and what is in the gap."""


class Titles:
    """Cuts texts at ``::`` where that is no part of a title.

    Args:
        known: titles that stand alone somewhere: in a list, or as a target.
    """

    def __init__(self, known: set[str]) -> None:
        self.known = known
        self._several: dict[str, list[tuple[list[str], str]]] = {}
        for title in sorted(known):
            if len(parts := _parts(title)) > 1:
                self._several.setdefault(parts[0], []).append((parts, title))

    def of(self, key: str, written: list[str] | str) -> list[str]:
        """The titles of a field without blank ones, which are padding.

        Raises:
            Unusable: a text can be cut in two ways.
        """
        if not isinstance(written, str):
            return [title for text in written if (title := clean(text))]
        parts, titles, place = _parts(written), [], 0
        for first, last, title in self._inside(parts):
            if first < place or self.known.issuperset(parts[first:last]):
                raise Unusable(f"{key} holds {{!r}}, which may be one title or several", title)
            titles += [*parts[place:first], title]
            place = last
        return [title for title in [*titles, *parts[place:]] if title]

    def _inside(self, parts: list[str]) -> Iterator[tuple[int, int, str]]:
        """The known titles that were cut, with the first of their ``parts`` and the next after."""
        for first, part in enumerate(parts):
            for cut, title in self._several.get(part, ()):
                if parts[first : (last := first + len(cut))] == cut:
                    yield first, last, title


@lru_cache(2**18)
def clean(title: str) -> str:
    """``title`` as a line of a file can hold it: white space is single blanks."""
    return " ".join(re.sub("[\0\ufeff]", " ", title).split())


def _parts(text: str) -> list[str]:
    return [clean(part) for part in text.split(SEPARATOR)]


def is_published(row: Mapping[str, Any]) -> bool:
    """Is a row of JSON of the kind that this module reads?"""
    return "itemList" in row


class Published:
    """Rows of published files, read from them as often as asked: what stays in memory are titles.

    Args:
        files: JSON files by phase, that of the test among them, each a list of rows or a row a
            line; may be compressed.
        encoding: of the files, or UTF-8.

    Attributes:
        titles: cuts texts.
        length: of most lists of the test; lists of another length are not used.

    Raises:
        UserError: a file cannot be read, is empty, is no JSON, or a row lacks a key or holds
            something else.
    """

    def __init__(self, files: Mapping[str, Path], encoding: str | None = None) -> None:
        self.files, self._encoding = files, encoding
        known: set[str] = set()
        for phase, file in files.items():
            if file.is_fifo():
                raise UserError(f"{file} must be a file, not a pipe, for it is read again.")
            for row in self._written(phase):
                known.update(_alone(row))
        self.titles = Titles(known - {""})
        test = Reader(self.titles, training=False)
        lengths = Counter(len(row.candidates) for row in test.read(self._written("test")))
        if not lengths:
            raise self._none(test, "test")
        self.length = max(lengths, key=lengths.__getitem__)
        self._readers = {
            phase: Reader(self.titles, training=phase == "train", length=self.length)
            for phase in files
        }

    def rows(self, phase: str) -> Iterator[Row]:
        """The rows of one file in titles, once; those of training may have no candidates.

        Raises:
            UserError: none can be used.
        """
        row = None
        for row in self._readers[phase].read(self._written(phase)):
            yield row
        if row is None:
            raise self._none(self._readers[phase], phase)

    def notes(self) -> list[str]:
        """What cannot be used of the rows that were read, a sentence for each fault."""
        return [
            sentence
            for phase, reader in reversed(self._readers.items())  # the test is what matters most
            for sentence in reader.sentences(self.files[phase])
        ]

    def _none(self, reader: Reader, phase: str) -> UserError:
        *_, last = reader.sentences(self.files[phase])
        return UserError(f"{last}; no row of this file can be used.")

    def _written(self, phase: str) -> Iterator[Row]:
        """The rows of one file, as they are written."""
        file, number = self.files[phase], 0
        for number, content in enumerate(json_rows(file, self._encoding), 1):
            yield _row(f"{file}, row {number}", number, content)
        if not number:
            raise UserError(f"{file} is empty; it must hold a row or more.")


def _row(where: str, number: int, content: object) -> Row:
    if not isinstance(content, dict):
        raise UserError(f"{where} must be an object with the keys {', '.join(KEYS)}.")
    for key in KEYS:
        if key not in content:
            others = ", ".join(map(str, content)) or "none"
            raise UserError(
                f"{where} has no {key!r}; it must have {', '.join(KEYS)}, not {others}."
            )
        value, alone = content[key], key == "trueSelection"
        texts = [value] if isinstance(value, str) or alone else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            kind = (
                "a title" if alone else f"a list of titles, or a text of them joined by {SEPARATOR}"
            )
            raise UserError(f"{where}: {key!r} must be {kind}.")
        if half := re.search(HALF, "".join(texts)):
            raise UserError(
                f"{where}: {key!r} holds {half[0]!r}, half of a character, which no file can hold."
            )
    history, candidates, target = (content[key] for key in KEYS)
    return Row(number, history, candidates, clean(target))


def _alone(row: Row) -> Iterator[str]:
    """All titles of a row that are no part of a text of several."""
    yield row.target
    for titles in (row.history, row.candidates):
        yield from map(clean, () if isinstance(titles, str) else titles)


@dataclass
class Reader:
    """Makes titles of the rows of one file, and counts those that cannot be used.

    Args:
        titles: cuts texts.
        training: a row whose list alone cannot be used is kept, without candidates.
        length: of lists that can be used; None: any.
    """

    titles: Titles
    training: bool
    length: int | None = None
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[tuple[int, object]]] = field(default_factory=dict)

    def read(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Those of ``rows`` that can be used, in titles."""
        for row in rows:
            try:
                history = self.titles.of("historyList", row.history)
                if not history or not row.target:
                    raise Unusable("{} has no title", KEYS[0] if row.target else KEYS[2])
            except Unusable as fault:
                self._note(row, "left out", *fault.args)
                continue
            try:
                candidates = self._candidates(row)
            except Unusable as fault:
                kept = "trained on, but without its list"
                self._note(row, kept if self.training else "left out", *fault.args)
                candidates = []
            if candidates or self.training:
                yield Row(row.number, history, candidates, row.target)

    def _candidates(self, row: Row) -> list[str]:
        candidates = self.titles.of("itemList", row.candidates)
        count = candidates.count(row.target)
        if count != 1:
            where = "is not in" if count == 0 else f"is {count} times in"
            raise Unusable(f"trueSelection {{!r}} {where} itemList", row.target)
        if len(candidates) < 2:
            raise Unusable("itemList has {!r} alone", row.target)
        if len(set(candidates)) < len(candidates):
            title, _ = Counter(candidates).most_common(1)[0]
            raise Unusable("itemList has {!r} twice", title)
        if len(candidates) != (self.length or len(candidates)):
            unlike = f"itemList has {{}} titles, and most of the test have {self.length}"
            raise Unusable(unlike, len(candidates))
        return candidates

    def _note(self, row: Row, outcome: str, what: str, value: object) -> None:
        examples = self.examples.setdefault((what, outcome), [])
        self.faults[what, outcome] += 1
        if len(examples) < SHOWN + 2:  # the first, the others, and one that shows there are more
            examples.append((row.number, value))

    def sentences(self, path: Path) -> Iterator[str]:
        """One for each fault, with the first of its rows and the numbers of others."""
        for (what, outcome), times in self.faults.items():
            (number, value), *others = self.examples[what, outcome]
            like = f", like {_some([str(other) for other, _ in others])}" if others else ""
            count = f"{times:,} row{'s' * (times > 1)}"
            yield f"{path}, row {number}: {what.format(value)}; {outcome}{like} ({count})"


def write_published(
    train: str | Path,
    valid: str | Path,
    test: str | Path,
    name: str,
    output: str | Path,
    encoding: str | None = None,
) -> str:
    """Write the folder ``<output>/<name>``, whole or not at all; returns what is in it, which rows
    cannot be used, and the command that trains on it.

    Each row becomes one row of RecBole's, of a user of its own: ``test-17`` is row 17 of the file
    of the test. So what is asked, and after which history, is what the file says. Equal titles are
    one item. The folder holds

    * ``<name>.train.inter``, ``<name>.valid.inter``, ``<name>.test.inter``: user, history, target;
    * ``<name>.item``: all titles, those of candidates that nobody met included;
    * ``candidates.jsonl``: an object a line with ``user``, ``target``, ``candidates`` (in the
      published order, the target among them) and ``phase`` (train, valid, test), in these ids;
    * ``<name>.yaml``: the settings with which RecBole reads all this.

    A row whose list cannot be used, or is not as long as most of the test are, is left out of
    validation and test; for training its history and target are kept, without a list.

    Args:
        train, valid, test, encoding: see :class:`Published`.

    Raises:
        UserError: a name or a file cannot be used, or no row of a file; or two are one file.
        UserError: there is such a folder already; nothing is overwritten.
    """
    check_name(name)
    folder = user_path(output) / name
    if folder.exists():
        raise UserError(f"{folder} exists already; delete it, or choose another name or output.")
    files = dict(zip(PHASES, map(user_path, (train, valid, test)), strict=True))
    for (one, first), (other, second) in combinations(files.items(), 2):
        if first.resolve() == second.resolve():
            raise UserError(
                f"lists_{other}={str(second)!r} is the file of lists_{one}; each must be another."
            )
    published = Published(files, encoding)
    with new_folder(folder) as place:
        ids, counts, longest = _write(place, name, published)
        settings = {
            "data_path": str(folder.parent.resolve()),
            "benchmark_filename": list(PHASES),
            "load_col": {"inter": ["user_id", "item_id_list", "item_id"], "item": ["item_id"]},
            "MAX_ITEM_LIST_LENGTH": longest,
            "title_article_first": False,
            "candidates_file": str(folder.resolve() / CANDIDATES),
        }
        text = yaml.safe_dump(settings, sort_keys=False)
        (place / f"{name}.yaml").write_text(text, encoding="utf-8")
    notes = published.notes()
    if cut := [title for title in ids if title not in published.titles.known]:
        notes.append(
            f"{len(cut):,} titles stand nowhere alone, only in texts cut at {SEPARATOR}; see that "
            f"none is a part of one: {_some(list(map(repr, cut)))}"
        )
    return "\n".join(
        [
            f"{folder}: {counts['train']:,} rows for training, {counts['valid']:,} for validation, "
            f"{counts['test']:,} for the test; {len(ids):,} items; histories of at most {longest} "
            f"titles, lists of {published.length}",
            *notes,
            f"next: recbole-sdpo run --model=SASRec --dataset={name} "
            f"--config_files={shlex.quote(str(folder / f'{name}.yaml'))}",
        ]
    )


def _write(
    folder: Path, name: str, published: Published
) -> tuple[dict[str, str], Counter[str], int]:
    """The rows, the lists and the items; returns the items' ids by title, how many rows each phase
    has, and the length of the longest history."""
    ids: dict[str, str] = {}
    counts: Counter[str] = Counter()
    longest = 0

    def of(titles: Iterable[str]) -> list[str]:
        return [ids.setdefault(title, str(len(ids) + 1)) for title in titles]

    with (folder / CANDIDATES).open("w", encoding="utf-8") as lists:
        for phase in PHASES:
            with (folder / f"{name}.{phase}.inter").open("w", encoding="utf-8") as events:
                events.write("user_id:token\titem_id_list:token_seq\titem_id:token\n")
                for row in published.rows(phase):
                    user, history, (target,) = (
                        f"{phase}-{row.number}",
                        of(row.history),
                        of([row.target]),
                    )
                    events.write(f"{user}\t{' '.join(history)}\t{target}\n")
                    if candidates := of(row.candidates):
                        one = {
                            "user": user,
                            "target": target,
                            "candidates": candidates,
                            "phase": phase,
                        }
                        lists.write(json.dumps(one) + "\n")
                    counts[phase] += 1
                    longest = max(longest, len(history))
    with (folder / f"{name}.item").open("w", encoding="utf-8") as items:
        items.write("item_id:token\ttitle:token_seq\n")
        items.writelines(f"{item}\t{without_quote(title)}\n" for title, item in ids.items())
    return ids, counts, longest


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)
