"""A table of runs: means over seeds, and which differences to the best baseline are significant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.ranks import metric_of_targets
from recbole_sdpo.evaluator.significance import Difference, holm, paired_difference
from recbole_sdpo.result import read_result

LEVEL = 0.05
"""A difference is called significant where its corrected p-value is below this."""


@dataclass
class Finished:
    """A run that has a result.

    Attributes:
        name: of its row.
        axis: of a row of a sweep: the sweep's name, the setting, the value.
        result: ``result.json``.
        ranks: of its last stage, ``ranks.csv``: user, item, rank, candidates, and maybe answer and named.
        steps: ``steps.csv``, or None for models without.
        wall_s: seconds of training and validation, those of the SFT that it began from included.
    """

    name: str
    axis: tuple[str, str, Any] | None
    seed: int
    result: dict[str, Any]
    ranks: pd.DataFrame
    steps: pd.DataFrame | None
    wall_s: float

    @classmethod
    def read(cls, folder: Path, start: Path | None, name: str, axis: tuple[str, str, Any] | None, seed: int) -> Finished:
        """What a run left in its folder, and what the run that it began from left in ``start``.

        Raises:
            UserError: a file is not what a run wrote.
        """
        result, *before = (read_result(part) for part in (folder, start) if part)
        text = {"user": str, "item": str, "answer": str, "named": str}
        ranks = pd.read_csv(folder / "ranks.csv", dtype=text, keep_default_na=False)
        steps = folder / "steps.csv"
        ranks = ranks[ranks["stage"] == list(result["stages"])[-1]]
        wall_s = sum(stage["wall_s"] for part in (result, *before) for stage in part["stages"].values())
        return cls(name, axis, seed, result, ranks, pd.read_csv(steps) if steps.is_file() else None, wall_s)


@dataclass
class Row:
    """A row of the table on one set of candidates.

    Attributes:
        users: each metric of each user, float64 ``[seeds, users]``; without those of answers for a model that writes none.
        user: who they are, ``[users]``, sorted: those whom every seed has.
        differences: for each metric the difference to the best baseline; none for that baseline itself.
        p: their p-values, Holm-corrected over the table.
        wall_s: mean seconds of training.
        improvement: of the first metric over the best baseline, as a share; not a number for that one itself.
    """

    name: str
    baseline: bool
    axis: tuple[str, str, Any] | None
    seeds: list[int]
    users: dict[str, np.ndarray]
    user: pd.Index
    wall_s: float
    improvement: float = float("nan")
    differences: dict[str, Difference] = field(default_factory=dict)
    p: dict[str, float] = field(default_factory=dict)

    def mean(self, metric: str) -> float:
        """Over users and seeds; not a number for a metric that the row has not."""
        return float(self.users[metric].mean()) if metric in self.users else float("nan")

    def std(self, metric: str) -> float:
        """Over seeds, of the sample; not a number for a single seed."""
        over_users = self.users[metric].mean(1) if metric in self.users else ()
        return float(over_users.std(ddof=1)) if len(over_users) > 1 else float("nan")

    def significant(self, metric: str) -> bool:
        """Does it differ from the best baseline beyond chance?"""
        return self.p.get(metric, 1.0) < LEVEL


@dataclass
class Comparison:
    """The table on one set of candidates.

    Attributes:
        candidates: their evaluation mode.
        best_baseline: for each metric the name of the baseline with the highest mean.
    """

    candidates: str
    metrics: list[str]
    rows: list[Row]
    best_baseline: dict[str, str]

    def place(self, row: Row, metric: str) -> int:
        """How many of the means are better than the row's; rows that are alike share a place."""
        return sum(other > row.mean(metric) for other in {other.mean(metric) for other in self.rows if metric in other.users})


def compare(runs: Sequence[Finished], candidates: str, metrics: Sequence[str], baselines: Sequence[str]) -> Comparison:
    """The table of ``runs`` on ``candidates``, with every row tested against the best baseline of each metric.

    Tests are over the users whom both rows have. Where no baseline has a result, or none has the metric, the first row that has
    stands in for them. A metric that no row has, as where all runs that write answers failed, is left out.

    Raises:
        UserError: no run has any metric.
    """
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        user = pd.concat([_by_user(run, candidates, metrics) for run in mine], axis=1, join="inner", keys=range(len(mine))).sort_index()
        users = {metric: user.xs(metric, axis=1, level=1).to_numpy().T for metric in metrics if (len(mine) - 1, metric) in user}
        wall = float(np.mean([run.wall_s for run in mine]))
        rows.append(Row(name, name in baselines, mine[0].axis, [run.seed for run in mine], users, user.index, wall))
    if not any(row.baseline for row in rows):
        rows[0].baseline = True
    having = {metric: [row for row in rows if metric in row.users] for metric in metrics}
    if not any(having.values()):
        raise UserError(f"metrics {', '.join(metrics)}: no run has one of them; ValidRatio and GenHit need a run of SDPO-LLM.")
    metrics, best = [metric for metric in metrics if having[metric]], {}
    for metric in metrics:
        best[metric] = max([row for row in having[metric] if row.baseline] or having[metric][:1], key=lambda row: row.mean(metric))
    for row in rows:
        if row is not best[metrics[0]] and metrics[0] in row.users and best[metrics[0]].mean(metrics[0]):
            row.improvement = row.mean(metrics[0]) / best[metrics[0]].mean(metrics[0]) - 1
        for metric in metrics:
            common = row.user.intersection(best[metric].user)
            if row is not best[metric] and metric in row.users and len(common) > 1:
                mine, theirs = (r.users[metric][:, r.user.get_indexer(common)] for r in (row, best[metric]))
                row.differences[metric] = paired_difference(mine, theirs)
    tested = [(row, metric) for row in rows for metric in row.differences]
    for (row, metric), p in zip(tested, holm([row.differences[metric].p for row, metric in tested])):
        row.p[metric] = float(p)
    return Comparison(candidates, list(metrics), rows, {metric: row.name for metric, row in best.items()})


def _by_user(run: Finished, candidates: str, metrics: Sequence[str]) -> pd.DataFrame:
    """A column for each metric that the run has."""
    targets = run.ranks[run.ranks["candidates"] == candidates].set_index("user")
    found = {metric: metric_of_targets(metric, targets) for metric in metrics}
    return pd.DataFrame({metric: values for metric, values in found.items() if values is not None}, index=targets.index)


def unfair(runs: Sequence[Finished], candidates: Sequence[str]) -> list[str]:
    """A sentence for each way in which the runs are not alike in what they were trained or judged on."""
    found = []
    for mode in candidates:
        found += _differ(runs, f"candidates {mode}", lambda run, mode=mode: run.result["candidates_sha256"][mode][:12])
        found += _differ(runs, f"test users ({mode})", lambda run, mode=mode: _users(run, mode))
    found += _differ(runs, "training targets an epoch", lambda run: f"{run.result['training_targets']:,}")
    return found


def _users(run: Finished, mode: str) -> str:
    users = run.ranks.loc[run.ranks["candidates"] == mode, "user"]
    return f"{len(users)} (checksum {int(pd.util.hash_pandas_object(users.sort_values(), index=False).sum()) % 10**6:06d})"


def _differ(runs: Sequence[Finished], what: str, of: Any) -> list[str]:
    groups: dict[str, list[str]] = {}
    for run in runs:
        names = groups.setdefault(of(run), [])
        if run.name not in names:
            names.append(run.name)
    if len(groups) < 2:
        return []
    return [f"not the same {what}: " + "; ".join(f"{value} for {', '.join(names)}" for value, names in groups.items())]
