"""Times as people write them: numbers of some unit, or dates."""

from __future__ import annotations

import re
import warnings
from decimal import Decimal, InvalidOperation

import pandas as pd
from pandas.tseries.api import guess_datetime_format

from recbole_sdpo.data.csv_columns import fault, refuse
from recbole_sdpo.data.tables import DIGITS

UNITS = {"seconds": 1e9, "milliseconds": 1e12, "microseconds": 1e15, "nanoseconds": 1e18}
"""About how many of each have passed since 1970, to a factor of ten."""

NO_DATE = r"now|today|\d{1,2}:\d\d(:\d\d(\.\d+)?)?\s*([ap]\.?m\.?)?"
"""A time of day, and what pandas takes for one."""

ZONE = r":\d\d.*?(?:Z|UTC|GMT|[+-]\d\d:?(?:\d\d)?)$"
"""How a time ends that tells its time zone."""

NAMED_ZONE = r":\d\d(?:[.,]\d+)?(?:\s*[AP]M)?\s*(?!(?:UTC|GMT|[AP]M)\b)[A-Z]{2,5}(?:\s\d{4})?$"
"""How one ends that names another one, which pandas would take for UTC's."""

EARLIEST, LATEST = 86_400, 4_102_444_800
"""Seconds since 1970 of times that are likely: 2 January 1970 and 1 January 2100."""


def read_times(text: pd.Series, source: str, stacklevel: int = 2) -> tuple[pd.Series, pd.Series]:
    """Numbers as they are, dates as seconds since 1970, in the first way to read them that serves
    for most rows; and what to order events by, which also tells times apart that are one number of
    64 bits.

    What is written must fix the order of the events: no dates that may be of day or of month first,
    no mix of units or of time zones.

    Warns:
        UserWarning: some times are unlikely; it names the line ``stacklevel`` calls up from here.

    Raises:
        UserError: a row has no time, or the order is not fixed.
    """
    refuse(
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
    refuse(
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
            stacklevel=stacklevel,
        )
    if order.dtype.kind == "f" and text.str.len().max() > DIGITS:
        order = text.map(_decimal)
    return times, order


def moment(seconds: float) -> str:
    """A date, where the number is likely to be seconds since 1970."""
    if 1e8 <= seconds <= LATEST:
        return str(pd.Timestamp(seconds, unit="s").date())
    return f"{seconds:g}"


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
    refuse(
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
        refuse(
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
        raise fault(
            source,
            first,
            text.name,
            repr(text[first]),
            f"{one}, and {text[second]!r} in row {second + 2} {other}",
        )
