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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from recbole_sdpo.data.atomic import HALF, UNREADABLE, check_name, decoded, without_quote
from recbole_sdpo.errors import UserError, reason
from recbole_sdpo.files import whole_folder, write_text

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


def clean(title: str) -> str:
    """``title`` as a line of a file can hold it: white space is single blanks."""
    return " ".join(re.sub("[\0\ufeff]", " ", title).split())


def _parts(text: str) -> list[str]:
    return [clean(part) for part in text.split(SEPARATOR)]


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
        train, valid, test: JSON files, each a list of rows or a row a line; may be compressed.
        encoding: of the files, or UTF-8.

    Raises:
        UserError: a name or a file cannot be used, or no row of a file.
        UserError: there is such a folder already; nothing is overwritten.
    """
    check_name(name)
    folder, files = Path(output) / name, dict(zip(PHASES, (train, valid, test), strict=True))
    if folder.exists():
        raise UserError(f"{folder} exists already; delete it, or choose another name or output.")
    written = {phase: _read(Path(path), encoding) for phase, path in files.items()}
    titles = Titles(_alone(chain.from_iterable(written.values())))
    notes: list[str] = []
    readers = {phase: Reader(titles, training=phase == "train") for phase in PHASES}
    rows = {phase: reader.read(written.pop(phase)) for phase, reader in readers.items()}
    lengths = Counter(len(row.candidates) for row in rows["test"] if row.candidates)
    length = max(lengths, key=lengths.__getitem__, default=0)
    for phase, reader in reversed(readers.items()):  # that of the test has no fault of others
        rows[phase] = reader.usable(rows[phase], length)
        notes += reader.sentences(Path(files[phase]))
        if not rows[phase]:
            raise UserError(f"{notes[-1]}; no row of this file can be used.")
    ids: dict[str, str] = {}
    for row in chain.from_iterable(rows.values()):
        for title in (*row.history, row.target, *row.candidates):
            ids.setdefault(title, str(len(ids) + 1))
    if cut := [title for title in ids if title not in titles.known]:
        notes.append(
            f"{len(cut):,} titles stand nowhere alone, only in texts cut at {SEPARATOR}; see that "
            f"none is a part of one: {_some(list(map(repr, cut)))}"
        )
    with whole_folder(folder) as place:
        settings = _write(place, name, str(output), rows, ids)
    counts = [f"{len(part):,}" for part in rows.values()]
    return "\n".join(
        [
            f"{folder}: {counts[0]} rows for training, {counts[1]} for validation, {counts[2]} for "
            f"the test; {len(ids):,} items; histories of at most "
            f"{settings['MAX_ITEM_LIST_LENGTH']} titles, lists of {length}",
            *notes,
            f"next: recbole-sdpo run --model=SASRec --dataset={name} "
            f"--config_files={shlex.quote(str(folder / f'{name}.yaml'))}",
        ]
    )


def _read(path: Path, encoding: str | None) -> list[Row]:
    """The rows of a file, as they are written.

    Raises:
        UserError: it cannot be read, is no JSON, or a row lacks a key or holds something else.
    """
    try:
        text = decoded(path, encoding)
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read: {reason(error)}; it must be JSON in {encoding or 'UTF-8'}."
        ) from error
    if text.lstrip().startswith("["):
        numbered = list(enumerate(_json(text, str(path)), 1))
    else:
        lines = enumerate(text.split("\n"), 1)
        numbered = [(n, _json(line, f"{path}, line {n},")) for n, line in lines if line.strip()]
    if not numbered:
        raise UserError(f"{path} is empty; it must hold a row or more.")
    return [_row(f"{path}, row {number}", number, content) for number, content in numbered]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({error}); it must be a list of rows, or a row on each line."
        ) from error


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


def _alone(rows: Iterator[Row]) -> set[str]:
    """All titles that are no part of a text of several."""
    known = set()
    for row in rows:
        known.add(row.target)
        for titles in (row.history, row.candidates):
            known.update(map(clean, () if isinstance(titles, str) else titles))
    return known - {""}


@dataclass
class Reader:
    """Makes titles of the rows of one file, and remembers which rows cannot be used.

    Args:
        titles: cuts texts.
        training: a row whose list alone cannot be used is kept, without candidates.
    """

    titles: Titles
    training: bool
    faults: dict[tuple[str, str], list[tuple[int, object]]] = field(default_factory=dict)

    def read(self, rows: list[Row]) -> list[Row]:
        """``rows`` in titles, without candidates where a list is of no use, but for those of which
        nobody can be asked."""
        return [asked for row in rows if (asked := self._asked(row))]

    def usable(self, rows: list[Row], length: int) -> list[Row]:
        """Those that can be used of ``rows``, which :meth:`read` has read, where lists have
        ``length`` candidates."""
        unlike = f"itemList has {{}} titles, and most of the test have {length}"
        read = [
            self._without_list(row, unlike, len(row.candidates))
            if row.candidates and len(row.candidates) != length
            else row
            for row in rows
        ]
        return [row for row in read if row.candidates or self.training]

    def _asked(self, row: Row) -> Row | None:
        try:
            history = self.titles.of("historyList", row.history)
            if not history or not row.target:
                raise Unusable("{} has no title", KEYS[0] if row.target else KEYS[2])
        except Unusable as error:
            self._note(row, "left out", *error.args)
            return None
        row = replace(row, history=history)
        try:
            candidates = self.titles.of("itemList", row.candidates)
            count = candidates.count(row.target)
            if count != 1:
                where = "is not in" if count == 0 else f"is {count} times in"
                raise Unusable(f"trueSelection {{!r}} {where} itemList", row.target)
            if len(candidates) < 2:
                raise Unusable("itemList has {!r} alone", row.target)
            title, times = Counter(candidates).most_common(1)[0]
            if times > 1:
                raise Unusable("itemList has {!r} twice", title)
        except Unusable as error:
            return self._without_list(row, *error.args)
        return replace(row, candidates=candidates)

    def _without_list(self, row: Row, what: str, value: object) -> Row:
        outcome = "trained on, but without its list" if self.training else "left out"
        self._note(row, outcome, what, value)
        return replace(row, candidates=[])

    def _note(self, row: Row, outcome: str, what: str, value: object) -> None:
        self.faults.setdefault((what, outcome), []).append((row.number, value))

    def sentences(self, path: Path) -> Iterator[str]:
        """One for each fault, with the first of its rows and the numbers of others."""
        for (what, outcome), rows in self.faults.items():
            (number, value), *others = rows
            like = f", like {_some([str(other) for other, _ in others])}" if others else ""
            count = f"{len(rows):,} row{'s' * (len(rows) > 1)}"
            yield f"{path}, row {number}: {what.format(value)}; {outcome}{like} ({count})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)


def _write(
    folder: Path, name: str, output: str, rows: Mapping[str, list[Row]], ids: Mapping[str, str]
) -> dict[str, Any]:
    """The files; returns the settings with which RecBole reads them."""
    settings = {
        "data_path": output,
        "benchmark_filename": list(rows),
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"], "item": ["item_id"]},
        "MAX_ITEM_LIST_LENGTH": max(len(row.history) for row in chain(*rows.values())),
        "title_article_first": False,
        "candidates_file": str(Path(output) / name / CANDIDATES),
    }
    lists = []
    for phase, part in rows.items():
        lines = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
        for row in part:
            user, target = f"{phase}-{row.number}", ids[row.target]
            lines.append(f"{user}\t{' '.join(ids[title] for title in row.history)}\t{target}")
            if row.candidates:
                candidates = [ids[title] for title in row.candidates]
                one = {"user": user, "target": target, "candidates": candidates, "phase": phase}
                lists.append(json.dumps(one))
        write_text(folder / f"{name}.{phase}.inter", "\n".join([*lines, ""]))
    items = [
        "item_id:token\ttitle:token_seq",
        *(f"{ids[title]}\t{without_quote(title)}" for title in ids),
    ]
    write_text(folder / f"{name}.item", "\n".join([*items, ""]))
    write_text(folder / CANDIDATES, "\n".join([*lists, ""]))
    write_text(folder / f"{name}.yaml", yaml.safe_dump(settings, sort_keys=False))
    return settings
