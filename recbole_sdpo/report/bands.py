"""Where a model is good: its metrics by how many users met the target in training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from recbole_sdpo.evaluator.ranks import metric_of_targets
from recbole_sdpo.report.comparison import FinishedRun

EDGES = (0, 1, 5, 20)
"""The fewest users of each band."""

BANDS = [
    *(f"{low}-{high - 1}".replace("0-0", "0") for low, high in pairwise(EDGES)),
    f"{EDGES[-1]} or more",
]
"""The bands' names."""


def band_of(met: pd.Series) -> np.ndarray:
    """The band's name of each target, by how many users met it."""
    return np.array(BANDS)[np.searchsorted(EDGES, met, "right") - 1]


def band_frame(
    runs: Sequence[FinishedRun], candidates: Sequence[str], metrics: Sequence[str]
) -> pd.DataFrame:
    """Means over targets and seeds, a row for each candidate set, metric, run and band.

    Columns are ``candidates``, ``metric``, ``model``, ``band``, ``targets`` (of all seeds) and
    ``mean``. Bands without targets are left out, and so are runs whose ``ranks.csv`` does not say
    how often a target was met.
    """
    parts = [
        pd.DataFrame(
            {
                "candidates": mode,
                "metric": metric,
                "model": run.name,
                "band": band_of(targets["met"]),
                "value": values,
            }
        )
        for mode in candidates
        for metric in metrics
        for run in runs
        if "met" in run.ranks
        for targets in [run.ranks[run.ranks["candidates"] == mode]]
        if (values := metric_of_targets(metric, targets)) is not None
    ]
    nothing = pd.DataFrame(columns=["candidates", "metric", "model", "band", "value"])
    by = ["candidates", "metric", "model", "band"]
    # in the order in which they came, but for bands
    frame = pd.concat(parts or [nothing]).astype({"band": pd.CategoricalDtype(BANDS, ordered=True)})
    groups = frame.groupby(by, sort=False, observed=True)["value"]
    means = groups.agg(targets="size", mean="mean").reset_index()
    for key in by[:3]:
        means[key] = pd.Categorical(means[key], means[key].unique(), ordered=True)
    return means.sort_values(by, ignore_index=True)


def band_table(frame: pd.DataFrame, candidates: str, metric: str) -> list[list[str]]:
    """Head and lines, one for each run and one of how many targets there are, of that part of a
    :func:`band_frame`; none where it is empty."""
    part = frame[(frame["candidates"] == candidates) & (frame["metric"] == metric)]
    bands = [band for band in BANDS if band in set(part["band"])]
    means = part.pivot(index="model", columns="band", values="mean")
    sizes = part.groupby("band", observed=True)["targets"].max()
    lines = [
        [f"{candidates}, {metric}, met by", *bands],
        *([name, *(_shown(means.loc[name, band]) for band in bands)] for name in means.index),
        ["targets", *(f"{sizes[band]:,}" for band in bands)],
    ]
    return lines if bands else []


def _shown(mean: float) -> str:
    return "" if np.isnan(mean) else f"{mean:.4f}"
