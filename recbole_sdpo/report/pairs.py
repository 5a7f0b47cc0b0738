"""Further tests: two rows of a table against each other, whichever baseline is the best."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from recbole_sdpo.evaluator.significance import LEVEL, holm
from recbole_sdpo.report.comparison import Comparison, agreeing, difference, difference_by_seed
from recbole_sdpo.report.table import signed

COLUMNS = [
    *("candidates", "model", "against", "metric"),
    *("difference", "low", "high", "test", "p", "p_holm", "by_seed"),
]
"""Of a :func:`pair_frame`."""


def pair_frame(comparisons: Sequence[Comparison], pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """The tests of ``pairs``, a row for each candidate set, pair and metric of users.

    Columns are :data:`COLUMNS`: ``difference``, of ``model`` less ``against``, its 95 % interval
    from ``low`` to ``high``, ``p_holm``, Holm-corrected over the pairs and metrics of a candidate
    set, and ``by_seed``, the differences of the seeds that both have. A pair of which one has no
    result is left out.

    Args:
        pairs: names of rows, each with that of the row it is tested against.
    """
    tables = [_table(comparison, pairs) for comparison in comparisons]
    return pd.concat(tables, ignore_index=True)


def _table(comparison: Comparison, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    rows = {row.name: row for row in comparison.rows}
    lines = [
        (
            *(comparison.candidates, name, other, metric, *tested),
            signed(difference_by_seed(rows[name], rows[other], metric)),
        )
        for name, other in pairs
        if {name, other} <= rows.keys()
        for metric in comparison.metrics
        if (tested := difference(rows[name], rows[other], metric))
    ]
    names = ["difference", "low", "high", "p", "test", "by_seed"]  # in a Difference, and one more
    table = pd.DataFrame(lines, columns=[*COLUMNS[:4], *names])
    return table.assign(p_holm=holm(table["p"].tolist()))[COLUMNS]


def pair_table(frame: pd.DataFrame, candidates: str) -> list[list[str]]:
    """Head and lines, one for each pair, of that part of a :func:`pair_frame`; none where it is
    empty. In brackets stand the ends of the interval, behind them p, which is uncorrected, and of
    several seeds how many have a difference of that sign."""
    part = frame[frame["candidates"] == candidates]
    if part.empty:
        return []
    cells = [
        f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}] {_p(row.p)}"
        + "*" * (row.p_holm < LEVEL)
        + _seeds_that_agree(row.difference, row.by_seed)
        for row in part.itertuples()
    ]
    pair = part["model"] + " less " + part["against"]
    shown = part.assign(cell=cells, pair=pair).pivot(index="pair", columns="metric", values="cell")
    metrics = part["metric"].unique()
    lines = shown.loc[pair.unique(), metrics].fillna("")
    return [[candidates, *metrics], *([name, *line] for name, *line in lines.itertuples())]


def _seeds_that_agree(difference: float, by_seed: str) -> str:
    seeds = [float(one) for one in by_seed.split()]
    if len(seeds) < 2 or difference == 0:
        return ""
    return f", {agreeing(difference, seeds)} of {len(seeds)} seeds"


def _p(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".")
