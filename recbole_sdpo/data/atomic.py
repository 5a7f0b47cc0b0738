"""RecBole's atomic files from a CSV of events and a CSV of items."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pandas as pd

from recbole_sdpo.data.catalogue import LONGEST_TITLE
from recbole_sdpo.data.csv_columns import HALF, read_columns, refuse
from recbole_sdpo.data.times import moment, read_times
from recbole_sdpo.errors import UserError
from recbole_sdpo.files import new_folder, user_path, whole_file

# pandas, by which RecBole reads ids, takes these for missing, and a quote at the start for that of
# a quoted field; the last is RecBole's padding.
NO_ID = r'|".*|#?N/?A|#N/A N/A|<NA>|n/a|NULL|null|None|-?(NaN|nan)|-?1\.#(IND|QNAN)|\[PAD\]'

ROUNDED = r"-?\d(\.\d+)?[eE]\+\d+"
"""A number of which a spreadsheet, or a column of floats, keeps the first digits only."""


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
    titles = [titles] if isinstance(titles, str) else list(titles)
    fields = _fields(titles)
    folder = user_path(output) / name
    for end in ("inter", "item"):
        if (path := folder / f"{name}.{end}").exists():
            raise UserError(f"{path} exists already; delete it, or choose another name or output.")

    wanted = {"user": [user], "item": [item], "time": [time]}
    rows, source = read_columns(events, "events", wanted, separator, encoding)
    inter = _inter(rows, user, item, time, source)
    item_key = item_key or item
    wanted = {"item_key": [item_key], "title": titles}
    rows, source = read_columns(items, "items", wanted, separator, encoding)
    texts = _items(rows, item_key, dict(zip(fields, titles, strict=True)), source)
    unique = texts.drop_duplicates("item_id:token")
    _check_lengths(unique, source)
    strangers = ~inter["item_id:token"].isin(unique["item_id:token"])
    if strangers.all():
        some = (inter["item_id:token"].iloc[0], unique["item_id:token"].iloc[0])
        raise UserError(
            "no item of the events is in the items file; its ids must be written alike, not "
            f"{some[0]!r} and {some[1]!r}."
        )

    _write(folder, {f"{name}.inter": inter, f"{name}.item": unique})
    first, last = (moment(inter["timestamp:float"].iloc[end]) for end in (0, -1))
    return (
        f"{folder}: {len(inter):,} events of {inter['user_id:token'].nunique():,} users and "
        f"{inter['item_id:token'].nunique():,} items from {first} to {last}; {len(unique):,} items "
        f"in the items file, {(unique['title:token_seq'] == '').sum():,} without a title; "
        f"{strangers.sum():,} events of items that are not in it; {len(texts) - len(unique):,} "
        "further rows of the same items left out"
    )


def _fields(titles: Sequence[str]) -> list[str]:
    """What the columns ``titles`` are called in the atomic file.

    Raises:
        UserError: there is none, two are one, or a name cannot be a column's.
    """
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
    return fields


def _inter(rows: pd.DataFrame, user: str, item: str, time: str, source: str) -> pd.DataFrame:
    """The events by time; those of one time as they stand in the file."""
    inter = pd.DataFrame(
        {"user_id:token": _ids(rows, user, source), "item_id:token": _ids(rows, item, source)}
    )
    # Warnings name the line that called write_atomic.
    inter["timestamp:float"], order = read_times(rows[time], source, stacklevel=4)
    inter = inter.loc[order.sort_values(kind="stable").index]
    if twice := int(inter.duplicated().sum()):
        warnings.warn(
            f"{twice:,} of {len(inter):,} events are there twice, with one user, item and time: a "
            "test target may then be the last item of its history. Remove them, or run with "
            "rm_dup_inter=first.",
            stacklevel=3,
        )
    return inter


def _items(rows: pd.DataFrame, key: str, columns: dict[str, str], source: str) -> pd.DataFrame:
    """All rows, with the texts of ``columns``, which go from new names to old ones."""
    texts = pd.DataFrame({"item_id:token": _ids(rows, key, source)})
    for field, column in columns.items():
        texts[f"{field}:token_seq"] = rows[column].map(without_quote)
    return texts


def _check_lengths(items: pd.DataFrame, source: str) -> None:
    long = items["title:token_seq"].str.len() > LONGEST_TITLE
    if long.any():
        key, text = items.loc[long, ["item_id:token", "title:token_seq"]].iloc[0]
        raise UserError(
            f"item {key!r} of {source} has a title of {len(text):,} characters, {text[:50]!r}…; it "
            f"must have {LONGEST_TITLE:,} at most."
        )


def _write(folder: Path, tables: dict[str, pd.DataFrame]) -> None:
    """All ``tables`` into ``folder``, or none."""
    with ExitStack() as whole:
        # A folder that is there already may hold files of the user's.
        place = whole.enter_context(nullcontext(folder) if folder.exists() else new_folder(folder))
        for name, table in tables.items():
            table.to_csv(
                whole.enter_context(whole_file(place / name)),
                sep="\t",
                index=False,
                quoting=csv.QUOTE_NONE,
                encoding="utf-8",
                lineterminator="\n",
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


def _ids(rows: pd.DataFrame, column: str, source: str) -> pd.Series:
    ids = rows[column]
    refuse(
        ids.str.fullmatch(ROUNDED),
        ids,
        source,
        "is a number without its last digits; ids must be text or whole numbers",
    )
    refuse(
        ids.str.fullmatch(NO_ID),
        ids,
        source,
        "is no id; it must be text other than NA, null and [PAD], without a quote at the start",
    )
    return ids
