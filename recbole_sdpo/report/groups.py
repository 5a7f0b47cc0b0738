"""Where a model is good: its metrics in groups of targets or of users, with intervals and tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from recbole_sdpo.evaluator.ranks import THIRDS
from recbole_sdpo.evaluator.significance import LEVEL, holm, interval
from recbole_sdpo.report.comparison import Comparison, FinishedRun, Row, difference

EDGES = (0, 1, 5, 20)
"""The fewest users of each band."""

KEYS = ["candidates", "grouping", "metric", "model", "group"]
"""Columns that name a row of a :func:`group_frame`."""

COLUMNS = [
    *KEYS,
    *("targets", "mean", "low", "high", "best_baseline"),
    *("difference", "difference_low", "difference_high", "test", "p", "p_holm"),
]
"""Its columns."""


def names_of(edges: Sequence[int]) -> list[str]:
    """The names of the ranges that begin at ``edges``, of which the last has no end: ``0``,
    ``1-4``, …, ``20 or more``."""
    ranges = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    return [*ranges, f"{edges[-1]} or more"]


def bands(met: pd.Series, edges: Sequence[int] = EDGES) -> pd.Series:
    """The range of each target, of those that begin at ``edges``: an ordered category."""
    return pd.cut(met, [*edges, np.inf], right=False, labels=names_of(edges))


def _thirds(popularity: pd.Series) -> pd.Series:
    return popularity.astype(pd.CategoricalDtype(THIRDS, ordered=True))


def _lengths(history: pd.Series) -> pd.Series:
    """Thirds of the users; those whose histories are equally long stay together."""
    ordered, users = np.sort(history), len(history)
    first = np.ceil(np.arange(3) * users / 3).astype(int).clip(max=users - 1)
    return bands(history, np.unique(ordered[first]).tolist())


@dataclass(frozen=True)
class Grouping:
    """A way to group targets, by a column of ``ranks.csv``.

    Attributes:
        heading: over its tables.
        head: in their first cell.
        groups: the ordered group of each target, from that column.
    """

    heading: str
    head: str
    groups: Callable[[pd.Series], pd.Series]


GROUPINGS = {
    "met": Grouping("By how many users met the target in training", "met by", bands),
    "popularity": Grouping("By popularity of the target", "target", _thirds),
    "history": Grouping(
        "By how many items the user met in training", "items of the user", _lengths
    ),
}
"""By the column of ``ranks.csv`` that says the group."""


def group_frame(
    comparisons: Sequence[Comparison], runs: Sequence[FinishedRun], groupings: Sequence[str]
) -> pd.DataFrame:
    """Metrics in groups, a row for each candidate set, grouping, metric, model and group.

    Columns are :data:`COLUMNS`: ``targets`` (one to a user), ``mean`` over them and seeds, ``low``
    and ``high`` (its 95 % interval, Wilson's or by Student's t), ``best_baseline`` (over all
    targets), ``difference`` to it with ``difference_low`` and ``difference_high``, ``test``, ``p``,
    and ``p_holm``, Holm-corrected over the table of one candidate set and grouping.
    Groups without targets are left out, and so are groupings that no run's ``ranks.csv`` knows.
    """
    tables = [
        _table(comparison, grouping, groups)
        for comparison in comparisons
        for grouping in groupings
        if (groups := _groups(comparison.candidates, runs, grouping)) is not None
    ]
    return pd.concat(tables or [pd.DataFrame(columns=COLUMNS)], ignore_index=True)


def _groups(candidates: str, runs: Sequence[FinishedRun], grouping: str) -> pd.Series | None:
    """Each user's group, by the first run that knows it: the targets are those of all."""
    known = [
        run.ranks[run.ranks["candidates"] == candidates].set_index("user")[grouping]
        for run in runs
        if grouping in run.ranks
    ]
    if not known:
        return None
    column = pd.concat(known)
    column = column[~column.index.duplicated()]
    return GROUPINGS[grouping].groups(column)


def _table(comparison: Comparison, grouping: str, groups: pd.Series) -> pd.DataFrame:
    rows = {row.name: row for row in comparison.rows}
    lines = [
        {
            "candidates": comparison.candidates,
            "grouping": grouping,
            "metric": metric,
            "model": row.name,
            "group": group,
            **_line(row, rows[comparison.best_baseline[metric]], metric, groups.index[of_group]),
        }
        for metric in comparison.best_baseline
        for row in comparison.rows
        if metric in row.users
        for group in groups.cat.categories
        if (of_group := groups == group).any()
    ]
    table = pd.DataFrame(lines, columns=COLUMNS).astype({"p": float, "p_holm": float})
    table = table[table["targets"] > 0].reset_index(drop=True)
    tested = table["p"].notna()
    table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"].tolist())
    return table


def _line(row: Row, best: Row, metric: str, users: pd.Index) -> dict[str, object]:
    """One row's metric on ``users``, and its difference to the ``best`` baseline."""
    mine = row.of(metric, row.user.intersection(users)).mean(0)
    low, high = interval(mine)
    line: dict[str, object] = {
        "targets": len(mine),
        "mean": mine.mean() if len(mine) else float("nan"),
        "low": low,
        "high": high,
        "best_baseline": best.name,
    }
    tested = None if row is best else difference(row, best, metric, users)
    if tested is None:
        return line
    return line | {
        "difference": tested.mean,
        "difference_low": tested.low,
        "difference_high": tested.high,
        "test": tested.test,
        "p": tested.p,
    }


def group_table(
    frame: pd.DataFrame, candidates: str, grouping: str, metric: str
) -> list[list[str]]:
    """Head and lines, one for each row and one of how many targets there are, of that part of a
    :func:`group_frame`; none where it is empty. In brackets stand the ends of the interval."""
    part = group_part(frame, candidates, grouping, metric)
    if part.empty:
        return []
    cells = part.assign(cell=[_cell(*cell) for cell in zip(*(part[c] for c in CELL), strict=True)])
    groups = in_order(part["group"])
    shown = cells.pivot(index="model", columns="group", values="cell").fillna("")
    sizes = part.groupby("group")["targets"].max()
    return [
        [f"{candidates}, {metric}, {GROUPINGS[grouping].head}", *groups],
        *([name, *shown.loc[name, groups]] for name in part["model"].unique()),
        ["targets", *(f"{sizes[group]:,}" for group in groups)],
    ]


def in_order(groups: Iterable[str]) -> list[str]:
    """The different ``groups`` of one grouping, whichever row has which: thirds as
    :data:`~recbole_sdpo.evaluator.ranks.THIRDS` has them, ranges by where they begin."""
    return sorted(
        set(groups),
        key=lambda group: (
            THIRDS.index(group) if group in THIRDS else int(re.split(r"\D", group)[0])
        ),
    )


def group_part(frame: pd.DataFrame, candidates: str, grouping: str, metric: str) -> pd.DataFrame:
    """The rows of a :func:`group_frame` that one table shows."""
    wanted = {"candidates": candidates, "grouping": grouping, "metric": metric}
    return frame[np.logical_and.reduce([frame[key] == value for key, value in wanted.items()])]


CELL = ["mean", "low", "high", "p_holm"]
"""What a cell of a table shows of a row."""


def _cell(mean: float, low: float, high: float, p: float) -> str:
    ends = "" if np.isnan(low) else f" [{low:.4f}, {high:.4f}]"
    return f"{mean:.4f}{ends}" + "*" * (p < LEVEL)
