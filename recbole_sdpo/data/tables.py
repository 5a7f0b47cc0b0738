"""One reader for RecBole's atomic files: text in rows and columns, in which every fault has a
file and a line."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from itertools import compress
from logging import getLogger
from pathlib import Path

import numpy as np

from recbole_sdpo.errors import UserError

TYPES = ("token", "float", "token_seq", "float_seq")

MISSING = {"", "nan", "na", "n/a", "<na>", "null", "none"}
"""What stands for a number that is missing, in small letters."""

DIGITS = 15
"""That float64 holds, whatever they are."""

NUL = "holds a NUL byte; the file must be text, in UTF-8 or in what encoding names"


@dataclass(frozen=True)
class Table:
    """The fields of an atomic file, as they are written.

    Atomic files have no quoting: a quote is a character, and a row is a line.

    Attributes:
        path: of the file.
        types: RecBole's type of each column, by the column's name, in the order of the file.
        lines: int64 ``[rows]``, a number from 1 in the file for each row; lines without any text
            are none.
        fields: all of them, row by row.
        quotes: is there a quote among them?
    """

    path: Path
    types: dict[str, str]
    lines: np.ndarray
    fields: list[str]
    quotes: bool

    def __len__(self) -> int:
        return len(self.lines)

    def text(self, column: str) -> np.ndarray:
        """The fields of a column, object ``[rows]``."""
        place = list(self.types).index(column)
        return np.array(self.fields[place :: len(self.types)], dtype=object)

    def at(self, row: int, column: str) -> str:
        """How a message names a field."""
        return f"{self.path}, line {self.lines[row]}, column {column!r}"

    def refuse(self, wrong: np.ndarray, column: str, why: str) -> None:
        """Refuse the column for the first of its rows that is ``wrong``, bool ``[rows]``.

        Raises:
            UserError: there is one.
        """
        if wrong.any():
            row = int(wrong.argmax())
            others = f" ({int(wrong.sum()):,} such rows)" if wrong.sum() > 1 else ""
            raise UserError(
                f"{self.at(row, column)}: {_short(self.text(column)[row])} {why}{others}."
            )

    def ids(self, column: str) -> np.ndarray:
        """A column of ids.

        Raises:
            UserError: one is missing, in quotes, or RecBole's name for the padding.
        """
        text = self.text(column)
        self.refuse(
            np.array([not field or field.isspace() for field in text]),
            column,
            "is no id; every row must have one",
        )
        self.refuse(
            text == "[PAD]", column, "is RecBole's name for the padding; an id must be another one"
        )
        self.refuse(
            self._in_quotes(text),
            column,
            "is in quotes, which would count as part of the id; atomic files must have none",
        )
        return text

    def numbers(self, column: str, needed: bool = False) -> np.ndarray:
        """A column of numbers, float64, with NaN for what is missing.

        Args:
            needed: none may be missing, and integers of which float64 does not hold all digits are
                int64.

        Raises:
            UserError: one is text or infinite, or missing although it is needed.
        """
        text = self.text(column)
        values = _floats(text)
        self.refuse(np.isinf(values), column, "must be a finite number")
        missing = np.isnan(values)
        if missing.any():
            words = missing.copy()
            words[missing] = [field.strip().lower() not in MISSING for field in text[missing]]
            dates = "; recbole-sdpo import makes numbers of dates" if needed else ""
            self.refuse(words, column, f"must be a number{dates}")
            if needed:
                self.refuse(missing, column, "is no time; every row must have one, as a number")
            getLogger().warning(
                f"{self.at(int(missing.argmax()), column)}: {missing.sum():,} of {len(self):,} "
                "numbers are missing; RecBole puts the mean of the others there."
            )
        elif needed and np.abs(values).max(initial=0) >= 2**53:
            try:
                return np.array([int(field) for field in text], dtype=np.int64)
            # some are no integers, or too large: float64 is what there is
            except (ValueError, OverflowError):
                pass
        if needed:
            self._refuse_lost_digits(text, values, column)
        return values

    def _refuse_lost_digits(self, text: np.ndarray, values: np.ndarray, column: str) -> None:
        """Do two different numbers become one in float64? It holds 15 digits, and mostly 17."""
        if max(map(len, text), default=0) <= DIGITS:
            return
        exact: dict[float, Decimal] = {}
        pairs = zip(values.tolist(), text, strict=True)
        lost = [
            exact.setdefault(value, number := Decimal(field.strip())) != number
            for value, field in pairs
        ]
        self.refuse(
            np.array(lost),
            column,
            "has more digits than float64 holds, which another row's time differs in; write whole "
            "numbers",
        )

    def sequences(self, column: str, separator: str) -> list[np.ndarray]:
        """A column of texts or of numbers, each cut at ``separator``: a row of words, or float64,
        for each.

        Raises:
            UserError: a number is none, or the texts are quoted as in CSV.
        """
        text = self.text(column)
        if self.types[column] == "float_seq":
            return [
                self._floats_of(row, column, field.split(separator))
                for row, field in enumerate(text)
            ]
        self.check_quotes(column)
        return [np.array([word for word in field.split(separator) if word]) for field in text]

    def check_quotes(self, column: str) -> None:
        """Is the column's text quoted as in CSV? It may also be meant so: "Heroes" is a song.

        Raises:
            UserError: it is beyond doubt.
        """
        text = self.text(column)
        quoted = self._in_quotes(text)
        if not quoted.any():
            return
        why = (
            "is quoted as in CSV; atomic files have no quoting, so write the text as it is "
            "(pandas: quoting=csv.QUOTE_NONE)"
        )
        self.refuse(quoted & np.array(['""' in field[1:-1] for field in text]), column, why)
        if 2 * quoted.sum() > len(text):
            self.refuse(quoted, column, why)
        getLogger().warning(
            f"{self.at(int(quoted.argmax()), column)}: {quoted.sum():,} texts begin and end with a "
            "quote; atomic files have no quoting, so it counts as part of the text."
        )

    def _in_quotes(self, text: np.ndarray) -> np.ndarray:
        if not self.quotes:
            return np.zeros(len(text), bool)
        return np.array([len(field) > 1 and field[0] == field[-1] == '"' for field in text], bool)

    def _floats_of(self, row: int, column: str, words: list[str]) -> np.ndarray:
        values = _floats(np.array([word for word in words if word], dtype=object))
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.at(row, column)}: {_short(self.text(column)[row])} must be finite numbers."
            )
        return values


def _floats(text: np.ndarray) -> np.ndarray:
    """Numbers as Python reads them, but without its underscores; NaN for what is none. float64."""
    try:
        values = text.astype(np.float64)
    except ValueError:
        values = np.array([_float(field) for field in text], dtype=np.float64)
    return np.where(np.array(["_" in field for field in text], bool), np.nan, values)


def _float(field: str) -> float:
    try:
        return float(field)
    except ValueError:
        return np.nan


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def read_table(path: Path, separator: str = "\t", encoding: str | None = None) -> Table:
    """Read an atomic file.

    Args:
        separator, encoding: RecBole's ``field_separator`` and ``encoding``; UTF-8 if there is none,
            with or without a byte-order mark.

    Raises:
        UserError: the file is not as an atomic file must be; the message names file, line and
            fault.
    """
    _check_separator(separator)
    text = _decoded(path, encoding or "utf-8").replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    if "\0" in text:
        number = next(number for number, line in enumerate(lines, 1) if "\0" in line)
        raise UserError(f"{path}, line {number} {NUL}.")
    types = _header(path, lines[0], separator)
    rows, where = _without_blank(lines)
    if not rows:
        raise UserError(f"{path} has a header and no rows; it must have one or more.")
    width = len(types)
    counts = np.fromiter((line.count(separator) for line in rows), np.int64, len(rows)) + 1
    if (counts != width).any():
        row = int((counts != width).argmax())
        quote = (
            "; a quote keeps neither separators nor line breaks together here"
            if '"' in rows[row]
            else ""
        )
        raise UserError(
            f"{path}, line {where[row]} has {counts[row]} fields, and the header {width}; they "
            "must be separated by one "
            f"{separator!r} each, as field_separator says{quote}: {_short(rows[row])}."
        )
    return Table(path, types, where, separator.join(rows).split(separator), '"' in text)


def read_header(path: Path, separator: str = "\t", encoding: str | None = None) -> dict[str, str]:
    """RecBole's type of each column of an atomic file, in the order of the file; no more of it is
    read than that takes.

    Raises:
        UserError: as by :func:`read_table`.
    """
    _check_separator(separator)
    try:
        with path.open(encoding=encoding or "utf-8") as file:
            line = file.readline().rstrip("\n")
    except (LookupError, UnicodeError):
        # It says what is wrong, and where; but UTF-16 without a mark is only wrong as it is read
        # line by line.
        line = _decoded(path, encoding or "utf-8").partition("\n")[0]
    return _header(path, line, separator)


def _check_separator(separator: str) -> None:
    if not isinstance(separator, str) or len(separator) != 1 or separator in "\r\n":
        raise UserError(f"field_separator={separator!r} must be one character, such as a tab.")


def _decoded(path: Path, encoding: str) -> str:
    content = path.read_bytes()
    try:
        return content.decode(encoding)
    except LookupError as error:
        raise UserError(
            f"encoding={encoding!r} is not known to Python; it must be one such as utf-8 or "
            "latin-1."
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not {encoding}; write the "
            "file in UTF-8, or set encoding to what it is in, such as latin-1."
        ) from error


def _header(path: Path, line: str, separator: str) -> dict[str, str]:
    types: dict[str, str] = {}
    line = line.removeprefix("\ufeff")
    if "\0" in line:
        raise UserError(f"{path}, line 1 {NUL}.")
    if not line.strip():
        raise UserError(
            f"{path}, line 1 is empty; it must be a header such as user_id:token, item_id:token, "
            "timestamp:float."
        )
    for field in line.split(separator):
        name, _, kind = field.rpartition(":")
        if field.strip('"') != field:
            raise UserError(
                f"{path}, line 1: column {_short(field)} is in quotes; atomic files must have none."
            )
        if not name or ":" in name or kind not in TYPES:
            other = next(
                (mark for mark in "\t,;| " if mark != separator and mark in field.strip()), None
            )
            hint = (
                f"; or its fields are separated by {other!r}: write {separator!r}, or set "
                "field_separator"
                if other
                else ""
            )
            raise UserError(
                f"{path}, line 1: column {_short(field)} must be name:type, such as user_id:token, "
                f"with one of the types {', '.join(TYPES)}{hint}."
            )
        if name in types:
            raise UserError(
                f"{path}, line 1: column {name!r} is there twice; each must have a name of its own."
            )
        types[name] = kind
    return types


def _without_blank(lines: list[str]) -> tuple[list[str], np.ndarray]:
    """The lines after the header that hold anything, and their numbers, int64."""
    held = np.array([bool(line) for line in lines])
    held[0] = False
    return list(compress(lines, held)), np.flatnonzero(held) + 1
