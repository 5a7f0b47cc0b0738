"""RecBole's atomic files from a CSV of events and a CSV of items."""

from __future__ import annotations

import csv
import io
import lzma
import re
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pandas.io.common import get_handle
from pandas.tseries.api import guess_datetime_format

from recbole_sdpo.data.catalogue import LONGEST_TITLE
from recbole_sdpo.data.tables import DIGITS
from recbole_sdpo.errors import UserError, meant, reason
from recbole_sdpo.files import new_folder, user_path, whole_file

# pandas, by which RecBole reads ids, takes these for missing, and a quote at the start for that of
# a quoted field; the last is RecBole's padding.
NO_ID = r'|".*|#?N/?A|#N/A N/A|<NA>|n/a|NULL|null|None|-?(NaN|nan)|-?1\.#(IND|QNAN)|\[PAD\]'

ROUNDED = r"-?\d(\.\d+)?[eE]\+\d+"
"""A number of which a spreadsheet, or a column of floats, keeps the first digits only."""

SEPARATORS = ",;\t|"
"""Those that are tried where none is given: the first by which the header has the wanted columns,
or else the one by which it has most."""

HALF = r"[\ud800-\udfff]"
"""Half of a character that UTF-16 writes as a pair; no file in UTF-8 can hold it."""

UNITS = {"seconds": 1e9, "milliseconds": 1e12, "microseconds": 1e15, "nanoseconds": 1e18}
"""About how many of each have passed since 1970, to a factor of ten."""

NO_DATE = r"now|today|\d{1,2}:\d\d(:\d\d(\.\d+)?)?\s*([ap]\.?m\.?)?"
"""A time of day, and what pandas takes for one."""

ZONE = r":\d\d.*?(?:Z|UTC|GMT|[+-]\d\d:?(?:\d\d)?)$"
"""How a time ends that tells its time zone."""

NAMED_ZONE = r":\d\d(?:[.,]\d+)?(?:\s*[AP]M)?\s*(?!(?:UTC|GMT|[AP]M)\b)[A-Z]{2,5}(?:\s\d{4})?$"
"""How one ends that names another one, which pandas would take for UTC's."""

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


def write_atomic(
    events: pd.DataFrame | str | Path,
    items: pd.DataFrame | str | Path,
    name: str,
    output: str | Path,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
    titles: str | Sequence[str] = ("title",),
    item_key: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
) -> str:
    """Write ``<output>/<name>/<name>.inter`` and ``.item``, both or neither; returns one line on
    what they hold.

    Args:
        events: a frame or a CSV file, in any order; the file may be compressed.
        items: a frame or a CSV file; of several rows of one item the first counts.
        user: a column of ``events``.
        item: a column of ``events``, and of ``items`` unless ``item_key``.
        time: a column of ``events``: a number, written as it is, or a date, written as seconds
            since 1970.
        titles: columns of ``items``. The first becomes ``title``, the others keep their names, for
            ``title_fields``.
        item_key: the column of ``items`` that holds the item, if it is not called ``item`` there.
        separator: of the columns in the files, or that of comma, semicolon, tab and bar by which
            the header has the columns.
        encoding: of the files, or UTF-8; a byte order mark tells UTF-16 by itself.

    Warns:
        UserWarning: some times are before 1970-01-02 or after 2100, or events are there twice.

    Raises:
        UserError: a name, file, column or value that cannot be used.
        UserError: there are such files already; nothing is overwritten.
    """
    check_name(name)
    folder, item_key = user_path(output) / name, item_key or item
    titles = [titles] if isinstance(titles, str) else list(titles)
    fields = ["title", *titles[1:]]
    wrong = rf'[:"\0-\x1f]|{HALF}'
    if (
        not titles
        or len({"item_id", *fields}) <= len(fields)
        or any(re.search(wrong, str(field)) for field in fields)
    ):
        raise UserError(
            f"titles={titles} become the columns {fields}; each needs a name of its own, without "
            "':', quotes and tabs."
        )
    paths = {end: folder / f"{name}.{end}" for end in ("inter", "item")}
    for path in paths.values():
        if path.exists():
            raise UserError(f"{path} exists already; delete it, or choose another name or output.")

    wanted = {"user": [user], "item": [item], "time": [time]}
    rows, source = _read(events, "events", wanted, separator, encoding)
    inter = pd.DataFrame(
        {"user_id:token": _ids(rows, user, source), "item_id:token": _ids(rows, item, source)}
    )
    inter["timestamp:float"], order = _times(rows[time], source)
    inter = inter.loc[order.sort_values(kind="stable").index]
    if twice := int(inter.duplicated().sum()):
        warnings.warn(
            f"{twice:,} of {len(inter):,} events are there twice, with one user, item and time: a "
            "test target may then be the last item of its history. Remove them, or run with "
            "rm_dup_inter=first.",
            stacklevel=2,
        )

    wanted = {"item_key": [item_key], "title": titles}
    rows, source = _read(items, "items", wanted, separator, encoding)
    texts = pd.DataFrame({"item_id:token": _ids(rows, item_key, source)})
    for field, column in zip(fields, titles, strict=True):
        texts[f"{field}:token_seq"] = rows[column].map(without_quote)
    unique = texts.drop_duplicates("item_id:token")
    long = unique["title:token_seq"].str.len() > LONGEST_TITLE
    if long.any():
        key, text = unique.loc[long, ["item_id:token", "title:token_seq"]].iloc[0]
        raise UserError(
            f"item {key!r} of {source} has a title of {len(text):,} characters, {text[:50]!r}…; it "
            f"must have {LONGEST_TITLE:,} at most."
        )
    strangers = ~inter["item_id:token"].isin(unique["item_id:token"])
    if strangers.all():
        some = (inter["item_id:token"].iloc[0], unique["item_id:token"].iloc[0])
        raise UserError(
            "no item of the events is in the items file; its ids must be written alike, not "
            f"{some[0]!r} and {some[1]!r}."
        )

    with ExitStack() as whole:
        # A folder that is there already may hold files of the user's.
        place = whole.enter_context(nullcontext(folder) if folder.exists() else new_folder(folder))
        for end, table in (("inter", inter), ("item", unique)):
            part = whole.enter_context(whole_file(place / paths[end].name))
            table.to_csv(
                part,
                sep="\t",
                index=False,
                quoting=csv.QUOTE_NONE,
                encoding="utf-8",
                lineterminator="\n",
            )
    first, last = (_moment(inter["timestamp:float"].iloc[end]) for end in (0, -1))
    return (
        f"{folder}: {len(inter):,} events of {inter['user_id:token'].nunique():,} users and "
        f"{inter['item_id:token'].nunique():,} items from {first} to {last}; {len(unique):,} items "
        f"in the items file, {(unique['title:token_seq'] == '').sum():,} without a title; "
        f"{strangers.sum():,} events of items that are not in it; {len(texts) - len(unique):,} "
        "further rows of the same items left out"
    )


def check_name(name: str) -> None:
    """May a dataset be called so?

    Raises:
        UserError: it may not.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name) or name == "ml-100k":
        raise UserError(
            f"name={name!r} must be of letters, digits, '_', '-' and '.'; ml-100k is the data "
            "that comes with RecBole."
        )


def without_quote(title: str) -> str:
    """A quote at the start would open a quoted field where RecBole reads the file."""
    return title.replace('"', "'") if title.startswith('"') else title


def _read(
    source: pd.DataFrame | str | Path,
    what: str,
    wanted: Mapping[str, Sequence[str]],
    separator: str | None,
    encoding: str | None,
) -> tuple[pd.DataFrame, str]:
    """The columns ``wanted``, by the option that names them, as text in which white space is single
    blanks, and what to call their source in an error."""
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
        frame = pd.read_csv(
            io.StringIO(text),
            dtype=str,
            keep_default_na=False,
            sep=chosen,
            quoting=_quoting(text, chosen),
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


def _quoting(text: str, separator: str) -> Literal[0, 3]:
    """Does a quote open a field, or is it a letter? Tables with tabs are written either way. There
    it is a letter if quoting makes no sense of it, unless the header is quoted. A title that begins
    with one would swallow the rows up to the next:
    ::

        5  "Heroes        5  Heroes 6 Brazil 7 Low
        6  Brazil    ->
        7  "Low

    Raises:
        ValueError: a field swallows rows so.
    """
    if '"' not in text:
        return csv.QUOTE_MINIMAL
    lines = io.StringIO(text, newline="").readlines()
    before = csv.field_size_limit(len(text))
    try:
        if separator == "\t" and not _is_quoted(lines, separator):
            header, *rows = [line for line in lines if line.strip()]
            tabs = header.count(separator)
            if '"' not in header and all(row.count(separator) == tabs for row in rows):
                return csv.QUOTE_NONE
        first, reader = 0, csv.reader(lines, delimiter=separator)
        for row in reader:
            long = reader.line_num > first + 1 and any(separator in field for field in row)
            if long and not _is_quoted(lines[first : reader.line_num], separator):
                raise ValueError(
                    f"a quote in line {first + 1} or below opens a field, and another one stands "
                    "within that; a quote that is a letter must be written twice, in a field that "
                    "is quoted"
                )
            first = reader.line_num
    finally:
        csv.field_size_limit(before)
    return csv.QUOTE_MINIMAL


def _is_quoted(lines: Sequence[str], separator: str) -> bool:
    """Does each quote open a field or end it, or is one of two?"""
    try:
        for _ in csv.reader(lines, delimiter=separator, strict=True):
            pass
    except csv.Error:
        return False
    return True


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
        raise _fault(
            source, row, column.name, repr(values[row]), "must be a text, a number or a date"
        )
    text = values.mask(missing, "").map(_written)
    _refuse(
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


EARLIEST, LATEST = 86_400, 4_102_444_800
"""Seconds since 1970 of times that are likely: 2 January 1970 and 1 January 2100."""

KINDS = (str, int, float, np.integer, np.floating, Decimal, date, pd.Period)


def _written(value: Any) -> str:
    if isinstance(value, float | np.floating) and (number := float(value)).is_integer():
        return str(int(number)) if abs(number) < 2**53 else f"{number:.17e}"
    return str(value)


def _ids(rows: pd.DataFrame, column: str, source: str) -> pd.Series:
    ids = rows[column]
    _refuse(
        ids.str.fullmatch(ROUNDED),
        ids,
        source,
        "is a number without its last digits; ids must be text or whole numbers",
    )
    _refuse(
        ids.str.fullmatch(NO_ID),
        ids,
        source,
        "is no id; it must be text other than NA, null and [PAD], without a quote at the start",
    )
    return ids


def _times(text: pd.Series, source: str) -> tuple[pd.Series, pd.Series]:
    """Numbers as they are, dates as seconds since 1970, in the first way to read them that serves
    for most rows; and what to order events by, which also tells times apart that are one number of
    64 bits.

    What is written must fix the order of the events: no dates that may be of day or of month first,
    no mix of units or of time zones.
    """
    _refuse(
        text.str.fullmatch(NO_DATE, flags=re.IGNORECASE),
        text,
        source,
        "has no date; it must be one, or a number",
    )
    times = pd.to_numeric(text, errors="coerce")
    times = times.where(times.abs() < float("inf")) if times.dtype.kind == "f" else times
    if 2 * times.count() >= len(text):
        unit = _unit(times, text, source)
        order = times
    else:
        order = _dates(text, source)
        unit, times = "seconds", (order - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    _refuse(
        times.isna(),
        text,
        source,
        "is no time; it must be a number, or a date such as 2024-01-31 18:05, written alike in "
        "all rows",
    )
    second = UNITS.get(unit, 0) / UNITS["seconds"]
    outside = ~times.between(EARLIEST * second, LATEST * second) & bool(unit)
    if outside.any():
        row = int(outside.to_numpy().argmax())
        warnings.warn(
            f"{source}, row {row + 2}, column {text.name!r}: {text[row]!r} and "
            f"{int(outside.sum()) - 1:,} further times are not "
            "between 1970-01-02 and 2100; is a missing time written so?",
            stacklevel=3,
        )
    if order.dtype.kind == "f" and text.str.len().max() > DIGITS:
        order = text.map(_decimal)
    return times, order


def _decimal(text: str) -> Decimal:
    """A number with all its digits; some that pandas reads are none to Decimal."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return Decimal(float(text))


def _unit(times: pd.Series, text: pd.Series, source: str) -> str:
    """The one of :data:`UNITS` that numbers look like, or none."""
    units = {
        unit: times.abs().between(about / 10, about * 10, inclusive="left")
        for unit, about in UNITS.items()
    }
    one, *others = [unit for unit, rows in units.items() if rows.any()] or [""]
    for other in others:
        _refuse_both(
            units[one],
            units[other],
            text,
            source,
            f"looks like {one}",
            f"like {other}; all must be of one unit",
        )
    return one


def _dates(text: pd.Series, source: str) -> pd.Series:
    """Moments, none where there is no date."""
    _refuse(
        text.str.contains(NAMED_ZONE),
        text,
        source,
        "names a time zone; write the hours from UTC, as in 2024-01-31 18:05-08:00",
    )
    zone = text.str.contains(ZONE)
    _refuse_both(
        zone,
        ~zone & text.str.contains(":"),
        text,
        source,
        "has a time zone",
        "has none; all must, or none",
    )
    read = [_read_dates(text, "ISO8601")]
    if 2 * read[0].count() <= len(text):
        read += [_read_dates(text, form) for form in _forms(text[0])]
    whole = [dates for dates in read if dates.notna().all()]
    for other in whole[1:]:
        _refuse(
            whole[0] != other,
            text,
            source,
            "may have the day or the month first; dates must be written as 2024-01-31",
        )
    return max(read, key=pd.Series.count)


def _read_dates(text: pd.Series, form: str) -> pd.Series:
    dates = pd.to_datetime(text, errors="coerce", utc=True, format=form)
    # what 64 bits of nanoseconds hold, and all that pandas 2 reads
    return dates.where(dates.dt.year.between(1678, 2261))


def _forms(date: str) -> list[str]:
    """How a date may be written, with the month first or the day."""
    halves = re.search(r"\s?[ap]m$", date, re.IGNORECASE)
    half = halves[0] if halves else ""  # pandas does not guess that there are two
    # it knows 03:04, but not 3:04
    day = re.sub(r"(?<!\d)(\d)(?!\d)", r"0\1", date.removesuffix(half))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the day stands first
        forms = {guess_datetime_format(day, dayfirst=dayfirst) or "" for dayfirst in (False, True)}
    # where the year stands first, the month comes next
    whole = sorted(form for form in forms if "%Y" in form and not re.match("%Y.%d", form))
    return [form.replace("%H", "%I") + half[:-2] + "%p" for form in whole] if half else whole


def _refuse_both(
    some: pd.Series, others: pd.Series, text: pd.Series, source: str, one: str, other: str
) -> None:
    if some.any() and others.any():
        first, second = (int(rows.to_numpy().argmax()) for rows in (some, others))
        raise _fault(
            source,
            first,
            text.name,
            repr(text[first]),
            f"{one}, and {text[second]!r} in row {second + 2} {other}",
        )


def _refuse(wrong: pd.Series, text: pd.Series, source: str, why: str) -> None:
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise _fault(source, row, text.name, repr(text[row]), why)


def _fault(source: str, row: int, column: object, value: str, why: str) -> UserError:
    return UserError(
        f"{source}, row {row + 2} (the header is row 1, without blank lines), column {column!r}: "
        f"{value} {why}."
    )


def _moment(seconds: float) -> str:
    """A date, where the number is likely to be seconds since 1970."""
    if 1e8 <= seconds <= LATEST:
        return str(pd.Timestamp(seconds, unit="s").date())
    return f"{seconds:g}"
