"""Columns of a CSV file or of a frame as text, whoever wrote it."""

from __future__ import annotations

import csv
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pandas.io.common import get_handle

from recbole_sdpo.errors import UserError, meant, reason

SEPARATORS = ",;\t|"
"""Those that are tried where none is given: the first by which the header has the wanted columns,
or else the one by which it has most."""

HALF = r"[\ud800-\udfff]"
"""Half of a character that UTF-16 writes as a pair; no file in UTF-8 can hold it."""

KINDS = (str, int, float, np.integer, np.floating, Decimal, date, pd.Period)

UNREADABLE = (
    ValueError,
    LookupError,
    OSError,
    EOFError,
    ImportError,
    csv.Error,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)
"""What is raised where a file, perhaps a compressed one, is no text, or nothing here unpacks it."""


def read_columns(
    source: pd.DataFrame | str | Path,
    what: str,
    wanted: Mapping[str, Sequence[str]],
    separator: str | None,
    encoding: str | None,
) -> tuple[pd.DataFrame, str]:
    """The columns ``wanted``, by the option that names them, as text in which white space is single
    blanks, and what to call their source in an error.

    Raises:
        UserError: the source cannot be read, or a column is not there once.
    """
    options = {column: option for option, names in reversed([*wanted.items()]) for column in names}
    columns = list(dict.fromkeys(column for names in wanted.values() for column in names))
    if isinstance(source, pd.DataFrame):
        frame, name, hint = source, what, ""
    elif isinstance(source, str | Path):
        frame, name = _read_csv(source, what, columns, separator, encoding), str(source)
        hint = (
            f" (with separator={separator or ','!r}; give the file's)"
            if len(frame.columns) == 1
            else ""
        )
    else:
        raise UserError(
            f"{what} is a {type(source).__name__}; it must be a pandas.DataFrame or the path of a "
            "CSV file."
        )
    for column in columns:
        count = sum(other == column for other in frame.columns)
        if count > 1:
            raise UserError(
                f"{name} has {count} columns {column!r}; each must have a name of its own."
            )
        if count == 0:
            advice = (
                "it is in the index, so call reset_index() first."
                if column in frame.index.names
                else meant(column, frame, "name one of them.")
            )
            raise UserError(
                f"{options[column]}={column!r} must be a column of {name}, which has "
                f"{', '.join(map(str, frame))}{hint}; {advice}"
            )
    if frame.empty:
        raise UserError(f"{name} has no rows; it must have one or more below its header.")
    return frame[columns].reset_index(drop=True).apply(_text, source=name), name


def _read_csv(
    path: str | Path,
    what: str,
    columns: Sequence[str],
    separator: str | None,
    encoding: str | None,
) -> pd.DataFrame:
    """All columns of a CSV file as text, empty where a row has none."""
    separator = "\t" if separator == r"\t" else separator
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        raise UserError(
            f"separator={separator!r} must be one character, such as ';', or \\t for a tab."
        )
    try:
        text = decoded(path, encoding)
        header = (re.findall(r"[^\r\n]*\S[^\r\n]*", text[: 1 << 20]) or [""])[0]
        headers = {
            each: next(csv.reader([header], delimiter=each), []) for each in separator or SEPARATORS
        }
        fits = lambda each: (set(columns) <= set(headers[each]), len(headers[each]))  # noqa: E731
        chosen = max(headers, key=fits)
        names = headers[chosen]
        text, quoting = _quoting(text, chosen)
        frame = pd.read_csv(
            io.StringIO(text),
            dtype=str,
            keep_default_na=False,
            sep=chosen,
            quoting=quoting,
        )
        if not isinstance(frame.index, pd.RangeIndex):  # pandas takes what has no name for an index
            raise ValueError("its rows have more values than its header has names")
    except UNREADABLE as error:
        given = (
            f"encoding={encoding!r}" * bool(encoding),
            f"separator={separator!r}" * bool(separator),
        )
        options = f" (with {', '.join(filter(None, given))})" if any(given) else ""
        raise UserError(
            f"{what}={str(path)!r} cannot be read{options}: {reason(error)}; it must be a CSV file "
            f"in {encoding or 'UTF-8'} with a header."
        ) from error
    # pandas renames what comes twice
    return frame.set_axis(names, axis=1) if len(names) == len(frame.columns) else frame


def _quoting(text: str, separator: str) -> tuple[str, Literal[0, 3]]:
    """The text as CSV, and whether a quote opens a field or is a letter.

    Tables with tabs are written either way. There it is a letter if quoting makes no sense of it,
    unless the header is quoted. A title that begins with one would swallow the rows up to the next:
    ::

        5  "Heroes        5  Heroes 6 Brazil 7 Low
        6  Brazil    ->
        7  "Low

    MySQL and R write a quote within a field as ``\\"``, and CSV writes it twice.

    Raises:
        ValueError: a quote neither opens nor ends a field, and pandas would drop it.
    """
    if '"' not in text:
        return text, csv.QUOTE_MINIMAL
    last = 0
    for form in _forms(text, separator):
        line = _misquoted(form, separator)
        if not line:
            return form, csv.QUOTE_MINIMAL
        last = max(line, last)
    if separator == "\t":
        header, *rows = [row for row in re.split("\r\n|\r|\n", text) if row.strip()]
        tabs = header.count(separator)
        if '"' not in header and all(row.count(separator) == tabs for row in rows):
            return text, csv.QUOTE_NONE
    raise ValueError(
        f"a quote in line {last} or below opens a field, and another one stands "
        "within that, or none ends it; a quote that is a letter must be written twice, in a field "
        "that is quoted"
    )


def _forms(text: str, separator: str) -> Iterator[str]:
    """``text``; then with quotes doubled that stand after a backslash; then without the blanks that
    are between a quote and the separator."""
    yield text
    doubled = re.sub(r'\\(["\\])', lambda pair: '""' if pair[1] == '"' else pair[1], text)
    yield doubled
    yield re.sub(rf'" +(?=[{re.escape(separator)}\r\n]|$)', '"', doubled)


def _misquoted(text: str, separator: str) -> int:
    """The number of the line where the first row begins in which a quote neither opens a field nor
    ends it, nor is one of two; 0 if there is none."""
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), 1
    before = csv.field_size_limit(len(text))
    try:
        for _ in reader:
            line = reader.line_num + 1
    except csv.Error:
        return line
    finally:
        csv.field_size_limit(before)
    return 0


def decoded(path: str | Path, encoding: str | None) -> str:
    """The text of a file, unpacked by its name; a null character, at which pandas would cut a
    cell, becomes a blank."""
    with get_handle(path, "rb", is_text=False, compression="infer") as opened:
        data = opened.handle.read()
    marked = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    try:
        return data.decode(encoding or marked).replace("\0", " ").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not in {encoding or marked}; encoding must be that of the file, such "
            "as cp1252, gb18030 or shift_jis"
        ) from error


def _text(column: pd.Series, source: str) -> pd.Series:
    """Values as text, empty where there is none. Whole numbers have no ``.0``, which they get
    where pandas has a gap to fill."""
    values = column.astype(object)
    missing = column.isna()
    wrong = ~missing & ~values.map(
        lambda value: isinstance(value, KINDS) and not isinstance(value, bool | np.bool_)
    ).astype(bool)
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise fault(
            source, row, column.name, repr(values[row]), "must be a text, a number or a date"
        )
    text = values.mask(missing, "").map(_written)
    refuse(
        text.str.contains(HALF),
        text,
        source,
        "holds half of a character (a lone surrogate), which no file can hold; cut it off",
    )
    text = text.str.replace("[\0\ufeff]", " ", regex=True).str.split().str.join(" ")
    filled = text[text != ""]
    return (
        text.str.removesuffix(".0")
        if len(filled) and filled.str.fullmatch(r"-?\d+\.0").all()
        else text
    )


def _written(value: Any) -> str:
    if isinstance(value, float | np.floating) and (number := float(value)).is_integer():
        return str(int(number)) if abs(number) < 2**53 else f"{number:.17e}"
    return str(value)


def refuse(wrong: pd.Series, text: pd.Series, source: str, why: str) -> None:
    """Name the first row that is ``wrong``.

    Raises:
        UserError: there is one.
    """
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise fault(source, row, text.name, repr(text[row]), why)


def fault(source: str, row: int, column: object, value: str, why: str) -> UserError:
    """The error on one cell; ``row`` counts from 0, without the header."""
    return UserError(
        f"{source}, row {row + 2} (the header is row 1, without blank lines), column {column!r}: "
        f"{value} {why}."
    )
