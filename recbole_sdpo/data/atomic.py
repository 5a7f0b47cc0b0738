"""RecBole atomic files from a CSV of events and a CSV of items: python -m recbole_sdpo.data.atomic --help"""

from __future__ import annotations

import argparse
import csv
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from recbole_sdpo.errors import UserError

# pandas, by which RecBole reads ids, takes these for missing, and a quote at the start for that of a quoted field.
NO_ID = r'|".*|#?N/?A|#N/A N/A|<NA>|n/a|NULL|null|None|-?(NaN|nan)|-?1\.#(IND|QNAN)'


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
) -> str:
    """Write ``<output>/<name>/<name>.inter`` and ``.item``; returns one line on what they hold.

    Args:
        events: a frame or a CSV file, in any order.
        items: a frame or a CSV file; of several rows of one item the first counts.
        user, item, time: columns of ``events``. Time is a number, written as it is, or a date, written as seconds since 1970.
        titles: columns of ``items``. The first becomes ``title``, the others keep their names, for ``title_fields``.
        item_key: the column of ``items`` that holds the item, if it is not called ``item`` there.

    Raises:
        UserError: a name, file, column or value that cannot be used.
        UserError: there are such files already; nothing is overwritten.
    """
    folder, item_key = Path(output) / name, item_key or item
    titles = [titles] if isinstance(titles, str) else titles
    if not re.fullmatch(r"[\w-][\w.-]*", name) or name == "ml-100k":
        raise UserError(f"name={name!r}: valid are letters, digits, '_', '-' and '.'; ml-100k is the data that comes with RecBole.")
    fields = ["title", *titles[1:]]
    if len({"item_id", *fields}) <= len(fields) or any(re.search(r'[:"\t\r\n]', field) for field in fields):
        raise UserError(f"titles={list(titles)} become the columns {fields}; each needs a name of its own, without ':', quotes and tabs.")
    paths = {end: folder / f"{name}.{end}" for end in ("inter", "item")}
    for path in paths.values():
        if path.exists():
            raise UserError(f"{path} exists already; delete it, or choose another name or output.")

    rows, source = _read(events, "events", [user, item, time])
    inter = pd.DataFrame({"user_id:token": _ids(rows, user, source), "item_id:token": _ids(rows, item, source)})
    inter["timestamp:float"] = _seconds(rows[time], source)
    # RecBole keeps time in float32, in which a minute of 2024 is an instant, and sorts ties as they stand in the file.
    inter = inter.sort_values("timestamp:float", kind="stable")

    rows, source = _read(items, "items", [item_key, *titles])
    texts = pd.DataFrame({"item_id:token": _ids(rows, item_key, source)})
    for field, column in zip(fields, titles, strict=True):
        # A quote at the start would open a quoted field where RecBole reads the file.
        texts[f"{field}:token_seq"] = rows[column].mask(rows[column].str.startswith('"'), rows[column].str.replace('"', "'"))
    unique = texts.drop_duplicates("item_id:token")
    strangers = ~inter["item_id:token"].isin(unique["item_id:token"])
    if strangers.all():
        some = (inter["item_id:token"].iloc[0], unique["item_id:token"].iloc[0])
        raise UserError(f"no item of the events is in the items file; its ids must be written alike, not {some[0]!r} and {some[1]!r}.")

    folder.mkdir(parents=True, exist_ok=True)
    for end, table in (("inter", inter), ("item", unique)):
        table.to_csv(paths[end], sep="\t", index=False, quoting=csv.QUOTE_NONE, encoding="utf-8", lineterminator="\n")
    first, last = (_moment(inter["timestamp:float"].iloc[end]) for end in (0, -1))
    return (
        f"{folder}: {len(inter):,} events of {inter['user_id:token'].nunique():,} users and {inter['item_id:token'].nunique():,} items "
        f"from {first} to {last}; {len(unique):,} items in the items file, {(unique['title:token_seq'] == '').sum():,} without a title; "
        f"{strangers.sum():,} events of items that are not in it; "
        f"{len(texts) - len(unique):,} further rows of the same items left out"
    )


def _read(source: pd.DataFrame | str | Path, what: str, columns: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """The wanted columns as text in which white space is single blanks, and what to call their source in an error."""
    frame, name = (source, what) if isinstance(source, pd.DataFrame) else (_read_csv(source), str(source))
    for column in columns:
        if column not in frame:
            near = difflib.get_close_matches(column, map(str, frame), 1)
            hint = f"did you mean {near[0]!r}? Valid" if near else "valid"
            raise UserError(f"{name} has no column {column!r}; {hint} are {', '.join(map(str, frame))}.")
    if frame.empty:
        raise UserError(f"{name} has no rows; it must have one or more below its header.")
    frame = frame[list(dict.fromkeys(columns))].reset_index(drop=True)
    frame = frame.astype(object).where(frame.notna(), "").astype(str)
    return frame.apply(lambda column: column.str.replace("\0", " ").str.split().str.join(" ")), name


def _read_csv(path: str | Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if not isinstance(frame.index, pd.RangeIndex):  # pandas takes what has no name for an index
            raise UserError("its rows have more values than its header has names")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).strip()}; it must be a CSV file in UTF-8 with a header.") from error
    return frame


def _ids(rows: pd.DataFrame, column: str, source: str) -> pd.Series:
    ids = rows[column]
    _refuse(ids.str.fullmatch(NO_ID), ids, source, "is no id; valid is any text but NA, null and their like, without a quote at the start")
    return ids


def _seconds(text: pd.Series, source: str) -> pd.Series:
    """Numbers as they are, dates as seconds since 1970, in the first way to read them that serves for most rows."""
    for form in ("number", "ISO8601", None):
        seconds = _as_seconds(text, form)
        if 2 * seconds.count() > len(text):
            break
    _refuse(seconds.isna(), text, source, "is no time; valid are numbers, or dates such as 2024-01-31 18:05, written alike in all rows")
    return seconds


def _as_seconds(text: pd.Series, form: str | None) -> pd.Series:
    if form == "number":
        numbers = pd.to_numeric(text, errors="coerce").astype(float)
        return numbers.where(numbers.abs() < float("inf"))
    # Where the first row tells no format, pandas warns that it guesses each row by itself, 02/01/24 and 31/01/24 differently.
    dates = pd.to_datetime(text, errors="coerce", utc=True, format=form)
    return (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)


def _refuse(wrong: pd.Series, text: pd.Series, source: str, why: str) -> None:
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise UserError(f"{source}, row {row + 2} (the header is row 1), column {text.name!r}: {text[row]!r} {why}.")


def _moment(seconds: float) -> str:
    """A date, where the number is likely to be seconds since 1970."""
    return str(pd.Timestamp(seconds, unit="s").date()) if 1e8 <= abs(seconds) < 1e10 else f"{seconds:g}"


def main() -> None:
    """Read two CSV files, write two atomic files, print one line."""
    parser = argparse.ArgumentParser(prog="python -m recbole_sdpo.data.atomic", description="RecBole atomic files from two CSV files.")
    parser.add_argument("--events", required=True, help="CSV file with a row for each event")
    parser.add_argument("--items", required=True, help="CSV file with a row for each item")
    parser.add_argument("--name", required=True, help="of the dataset, such as shop")
    parser.add_argument("--output", default="data", help="folder in which that of the dataset is made (default: data)")
    parser.add_argument("--user", default="user_id", help="column of the events (default: user_id)")
    parser.add_argument("--item", default="item_id", help="column of the events, and of the items unless --item_key (default: item_id)")
    parser.add_argument("--item_key", help="column of the items that holds the item, if its name differs from that in the events")
    parser.add_argument("--time", default="timestamp", help="column of the events: a number or a date (default: timestamp)")
    parser.add_argument("--title", action="append", help="column of the items (default: title); give it again for further columns")
    args = vars(parser.parse_args())
    try:
        print(write_atomic(titles=args.pop("title") or ["title"], **args))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
