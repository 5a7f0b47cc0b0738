"""A table of runs: means over seeds, and which differences to the best baseline are significant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_sdpo.checks.metrics import is_of_lists, metric_key
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.audit import Audit, floor_rows
from recbole_sdpo.evaluator.ranks import metric_of_targets
from recbole_sdpo.evaluator.significance import LEVEL, Difference, holm, paired_difference
from recbole_sdpo.result import RANKS_FILE, read_result
from recbole_sdpo.trainer.step_file import STEPS_FILE

SEQUENTIAL = "ModelType.SEQUENTIAL"
"""The kind of a model that reads histories, as a result has it."""


@dataclass
class FinishedRun:
    """A run that has a result.

    Attributes:
        name: of its row.
        axis: of a row of a sweep: the sweep's name, the setting, the value.
        result: ``result.json``.
        ranks: of its last stage, ``ranks.csv``: user, item, rank, candidates, stage, what the
            target and the history are for groups, and maybe answer and named.
        steps: ``steps.csv``, or no rows for models without.
        wall_s: seconds of training and validation, those of the SFT that it began from included.
        cost: of :data:`COST`, not a number where a run does not say it.
    """

    name: str
    axis: tuple[str, str, Any] | None
    seed: int
    result: dict[str, Any]
    ranks: pd.DataFrame
    steps: pd.DataFrame
    wall_s: float
    cost: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        folder: Path,
        start: Path | None,
        name: str,
        axis: tuple[str, str, Any] | None,
        seed: int,
    ) -> FinishedRun:
        """What a run left in its folder, and what the run that it began from left in ``start``.

        Raises:
            UserError: a file is not what a run wrote.
        """
        result, *before = (read_result(part) for part in (folder, start) if part)
        text = {"user": str, "item": str, "answer": str, "named": str}
        ranks = pd.read_csv(folder / RANKS_FILE, dtype=text, keep_default_na=False)
        file = folder / STEPS_FILE
        steps = pd.read_csv(file) if file.is_file() else pd.DataFrame({"stage": []})
        ranks = ranks[ranks["stage"] == list(result["stages"])[-1]]
        wall_s = sum(
            stage["wall_s"] for part in (result, *before) for stage in part["stages"].values()
        )
        return cls(name, axis, seed, result, ranks, steps, wall_s, _cost([result, *before]))


COST = {
    "targets_per_s": ("targets/s", ",.0f"),
    "peak_memory_gib": ("GiB", ".1f"),
    "top10_ms": ("top 10, ms", ".1f"),
}
"""What a run costs besides minutes: training targets a second, its epochs alone; the largest memory
of the process; the time for one user's ten best items. The head of a column, and how a number is
written."""


def _cost(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of a run and those that it began from, itself the first."""
    stages = [stage for result in results for stage in result["stages"].values()]
    train_s = sum(stage["train_s"] for stage in stages)
    targets = sum(stage["targets"] for stage in stages)
    return {
        "targets_per_s": targets / train_s if train_s else float("nan"),
        "peak_memory_gib": max(result["peak_memory_gib"] for result in results),
        "top10_ms": (results[0].get("top10") or {}).get("ms", float("nan")),
    }


@dataclass(frozen=True)
class Published:
    """A value that someone published for a row.

    Attributes:
        metric: one of the table's.
        value: from 0 to 1, or more of a metric of lists.
        source: where it stands, in words.
    """

    metric: str
    value: float
    source: str


@dataclass
class Row:
    """A row of the table on one set of candidates.

    Attributes:
        users: each metric of each user, float64 ``[seeds, users]``; without those of answers for a
            model that writes none.
        lists: each metric of what all users get, float64 ``[seeds]``.
        user: who they are, ``[users]``, sorted: those whom every seed has.
        differences: for each metric the difference to the best baseline; none for that baseline
            itself.
        differences_by_seed: for each metric of ``differences`` those of
            :func:`difference_by_seed`.
        p: their p-values, Holm-corrected over the table.
        wall_s: mean seconds of training.
        cost: of :data:`COST`, means over seeds.
        improvement: of the first metric over the best baseline, as a share; not a number for that
            one itself.
    """

    name: str
    baseline: bool
    axis: tuple[str, str, Any] | None
    seeds: list[int]
    users: dict[str, np.ndarray]
    lists: dict[str, np.ndarray]
    user: pd.Index
    wall_s: float
    cost: dict[str, float]
    improvement: float = float("nan")
    differences: dict[str, Difference] = field(default_factory=dict)
    differences_by_seed: dict[str, list[float]] = field(default_factory=dict)
    p: dict[str, float] = field(default_factory=dict)

    def of(self, metric: str, users: pd.Index) -> np.ndarray:
        """The metric of some of the users, float64 ``[seeds, users]``."""
        return self.users[metric][:, self.user.get_indexer(users)]

    def by_seed(self, metric: str) -> np.ndarray:
        """Of each seed the mean over users, or what all of them get, float64; empty for a metric
        that the row has not."""
        if metric in self.lists:
            return self.lists[metric]
        return self.users[metric].mean(1) if metric in self.users else np.empty(0)

    def mean(self, metric: str) -> float:
        """Over users and seeds; not a number for a metric that the row has not."""
        seeds = self.by_seed(metric)
        return float(seeds.mean()) if len(seeds) else float("nan")

    def std(self, metric: str) -> float:
        """Over seeds, of the sample; not a number for a single seed."""
        seeds = self.by_seed(metric)
        return float(seeds.std(ddof=1)) if len(seeds) > 1 else float("nan")

    def significant(self, metric: str) -> bool:
        """Does it differ from the best baseline beyond chance?"""
        return self.p.get(metric, 1.0) < LEVEL


@dataclass
class Comparison:
    """The table on one set of candidates.

    Attributes:
        candidates: their evaluation mode.
        best_baseline: for each metric of users the name of the baseline with the highest mean;
            where none has the metric, of the first row.
        costs: does the table show :data:`COST`?
        published: what others published, by the name of the row.
        floor: rows of guessers that see no history, below the others: their means by metric.
    """

    candidates: str
    metrics: list[str]
    rows: list[Row]
    best_baseline: dict[str, str]
    costs: bool = False
    published: dict[str, list[Published]] = field(default_factory=dict)
    floor: dict[str, dict[str, float]] = field(default_factory=dict)

    def place(self, row: Row, metric: str) -> int:
        """How many of the means are better than the row's; rows that are alike share a place."""
        means = {other.mean(metric) for other in self.rows if metric in other.users}
        return sum(mean > row.mean(metric) for mean in means)


def compare(
    runs: Sequence[FinishedRun],
    candidates: str,
    metrics: Sequence[str],
    baselines: Sequence[str],
    costs: bool = False,
    audited: bool = False,
) -> Comparison:
    """The table of ``runs`` on ``candidates``, rows tested against each metric's best baseline.

    Tests are over the users whom both rows have; a metric of what all users get is one number, and
    has none. Where no baseline has a result, or none has the
    metric, the first row that has stands in for them. A metric that no row has, as where all runs
    that write answers failed, is left out.

    Args:
        audited: show what the audit of the first run's candidates found.

    Raises:
        UserError: no run has any metric.
    """
    rows = _rows(runs, candidates, metrics, baselines)
    best = _best_baselines(rows, [metric for metric in metrics if not is_of_lists(metric)])
    first = next(iter(best))
    for row in rows:
        row.improvement = _improvement(row, best[first], first)
        row.differences = _differences(row, best)
        row.differences_by_seed = {
            metric: difference_by_seed(row, best[metric], metric) for metric in row.differences
        }
    tested = [(row, metric) for row in rows for metric in row.differences]
    corrected = holm([row.differences[metric].p for row, metric in tested])
    for (row, metric), p in zip(tested, corrected, strict=True):
        row.p[metric] = float(p)
    names = {metric: row.name for metric, row in best.items()}
    shown = [name for name in metrics if any(len(row.by_seed(name)) for row in rows)]
    floor = _floor(runs[0].result["audit"].get(candidates), list(best)) if audited else {}
    return Comparison(candidates, shown, rows, names, costs, floor=floor)


def _floor(found: dict[str, Any] | None, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each guesser those of ``metrics`` that it has."""
    floor = {}
    for name, means in floor_rows(found).items() if found else ():
        keys = {metric: metric_key(metric) for metric in metrics}
        floor[name] = {metric: means[key] for metric, key in keys.items() if key in means}
    return floor


def _rows(
    runs: Sequence[FinishedRun], candidates: str, metrics: Sequence[str], baselines: Sequence[str]
) -> list[Row]:
    """A row for each name, one of them a baseline at least."""
    by_name: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    rows = []
    for name, seeds in by_name.items():
        tables = [_by_user(run, candidates, metrics) for run in seeds]
        table = pd.concat(tables, axis=1, join="inner", keys=range(len(seeds))).sort_index()
        everywhere = [metric for metric in metrics if (len(seeds) - 1, metric) in table]
        users = {metric: table.xs(metric, axis=1, level=1).to_numpy().T for metric in everywhere}
        rows.append(
            Row(
                name=name,
                baseline=name in baselines,
                axis=seeds[0].axis,
                seeds=[run.seed for run in seeds],
                users=users,
                lists=_of_lists(seeds, candidates, metrics),
                user=table.index,
                wall_s=float(np.mean([run.wall_s for run in seeds])),
                cost={
                    key: float(np.mean([run.cost.get(key, float("nan")) for run in seeds]))
                    for key in COST
                },
            )
        )
    if not any(row.baseline for row in rows):
        rows[0].baseline = True
    return rows


def _by_user(run: FinishedRun, candidates: str, metrics: Sequence[str]) -> pd.DataFrame:
    """A column for each metric that the run has."""
    targets = run.ranks[run.ranks["candidates"] == candidates].set_index("user")
    columns = {
        metric: metric_of_targets(metric, targets) for metric in metrics if not is_of_lists(metric)
    }
    columns = {metric: values for metric, values in columns.items() if values is not None}
    return pd.DataFrame(columns, index=targets.index)


def _of_lists(
    runs: Sequence[FinishedRun], candidates: str, metrics: Sequence[str]
) -> dict[str, np.ndarray]:
    """Each metric of what all users get that every run has."""
    asked = [metric for metric in metrics if is_of_lists(metric)]
    tests = [
        list(run.result["stages"].values())[-1]["candidates"][candidates]["test"]
        for run in (runs if asked else ())
    ]
    return {
        metric: np.array([test[metric.lower()] for test in tests], float)
        for metric in asked
        if all(metric.lower() in test for test in tests)
    }


def _best_baselines(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Row]:
    """The best baseline of each metric that a row has."""
    best = {}
    for metric in metrics:
        having = [row for row in rows if metric in row.users]
        if having:
            among = [row for row in having if row.baseline] or having[:1]
            best[metric] = max(among, key=lambda row: row.mean(metric))
    if not best:
        raise UserError(
            f"metrics {', '.join(metrics)}: no run has one of them; "
            "ValidRatio and GenHit need a run of SDPO-LLM."
        )
    return best


def _improvement(row: Row, best: Row, metric: str) -> float:
    if row is best or metric not in row.users or not best.mean(metric):
        return float("nan")
    return row.mean(metric) / best.mean(metric) - 1


def _differences(row: Row, best: dict[str, Row]) -> dict[str, Difference]:
    return {
        metric: tested
        for metric, other in best.items()
        if row is not other and (tested := difference(row, other, metric))
    }


def difference(
    row: Row, other: Row, metric: str, users: pd.Index | None = None
) -> Difference | None:
    """``row`` less ``other``, over those of ``users`` (None for all) whom both rows have; None for
    fewer than two of them, or where a row has no such metric of users."""
    common = row.user.intersection(other.user)
    if users is not None:
        common = common.intersection(users)
    if len(common) < 2 or not (metric in row.users and metric in other.users):
        return None
    return paired_difference(row.of(metric, common), other.of(metric, common))


def difference_by_seed(row: Row, other: Row, metric: str) -> list[float]:
    """``row`` less ``other`` in each seed that both have, in the order of ``row``, over the users
    whom both have, to four decimals."""
    users = row.user.intersection(other.user)
    first, second = (pd.Series(one.of(metric, users).mean(1), one.seeds) for one in (row, other))
    return (first - second).dropna().round(4).tolist()


def agreeing(difference: float, by_seed: Sequence[float]) -> int:
    """How many of ``by_seed`` have the sign of ``difference``."""
    return sum(one * difference > 0 for one in by_seed)


def unfair(runs: Sequence[FinishedRun], candidates: Sequence[str]) -> list[str]:
    """A sentence for each way in which the runs were not trained or judged on the same, or on what
    gives its targets away."""
    sentences = []
    for mode in candidates:
        digests = [run.result["candidates_sha256"][mode][:12] for run in runs]
        sentences += _differ(runs, f"candidates {mode}", digests)
        sentences += _differ(runs, f"test users ({mode})", [_users(run, mode) for run in runs])
        # Lists that give their targets away do so for every model.
        found = (run.result.get("audit", {}).get(mode) for run in runs)
        told = [Audit.from_json(audit).warnings(mode) for audit in found if audit]
        sentences += dict.fromkeys(chain.from_iterable(told))
    targets = [f"{run.result['training_targets']:,}" for run in runs]
    sentences += _differ(runs, "training targets an epoch", targets)
    readers = [run for run in runs if run.result["settings"].get("MODEL_TYPE") == SEQUENTIAL]
    lengths = [str(run.result["settings"]["MAX_ITEM_LIST_LENGTH"]) for run in readers]
    return sentences + _differ(readers, "items of history", lengths)


def kept_starts(runs: Sequence[FinishedRun], candidates: Sequence[str]) -> list[str]:
    """A sentence for each candidate set on which alignments kept their start, for no epoch was
    better in validation. It does not see those with ``popularity_discount``, which is of the
    scores after alignment alone."""
    sentences = []
    for mode in candidates:
        by_row: dict[str, list[bool]] = {}
        for run in runs:
            *before, last = run.result["stages"].values()
            valid = last["candidates"][mode]["valid"]
            if before and last["targets"] and valid:
                same = valid == before[-1]["candidates"][mode]["valid"]
                by_row.setdefault(run.name, []).append(same)
        names = [
            name if all(seeds) else f"{name} ({sum(seeds)} of {len(seeds)} seeds)"
            for name, seeds in by_row.items()
            if any(seeds)
        ]
        if names:
            sentences.append(
                f"{mode}: no epoch was better than the start, which was kept: {'; '.join(names)}"
            )
    return sentences


def _users(run: FinishedRun, mode: str) -> str:
    users = run.ranks.loc[run.ranks["candidates"] == mode, "user"]
    checksum = int(pd.util.hash_pandas_object(users, index=False).sum()) % 10**6
    return f"{len(users)} (checksum {checksum:06d})"


def _differ(runs: Sequence[FinishedRun], what: str, values: Sequence[str]) -> list[str]:
    """A sentence, if the runs have more than one value."""
    groups: dict[str, list[str]] = {}
    for run, value in zip(runs, values, strict=True):
        names = groups.setdefault(value, [])
        if run.name not in names:
            names.append(run.name)
    if len(groups) < 2:
        return []
    parts = (f"{value} for {', '.join(names)}" for value, names in groups.items())
    return [f"not the same {what}: " + "; ".join(parts)]
