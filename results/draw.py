"""Draw the figures of README.md beside this file from the tables' own results: python
results/draw.py"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recbole_sdpo.checks.metrics import metric_key
from recbole_sdpo.report import figures
from recbole_sdpo.report.comparison import Comparison, Row

HERE = Path(__file__).parent

SHOWN = (
    "Pop",
    "GRU4Rec",
    "SASRec",
    "BERT4Rec",
    "SFT",
    "SFT, longer",
    "DPO",
    "S-DPO",
    "S-DPO, popularity^2",
)
"""Rows of the main table that its figure has."""


def main() -> None:
    (HERE / "figures").mkdir(exist_ok=True)
    for name, figure in {"main-table": main_table(), "negatives": negatives()}.items():
        figure.savefig(HERE / "figures" / f"{name}.png", dpi=110, facecolor="white")


def main_table() -> Figure:
    """HR@1 of the main table, a panel for each candidate set."""
    runs = read_results(HERE / "ml-100k" / "main" / "results.jsonl.gz")
    panels = [f"HR@1, {candidates}" for candidates in ("uni19", "pop19")]
    baselines = {run["name"] for run in runs if run["model"] != "SDPO-LLM"}
    rows = [row(runs, name, {panel: (panel[6:], "HR@1") for panel in panels}) for name in SHOWN]
    for shown in rows:
        shown.baseline = shown.name in baselines
    figure = figures.bars(Comparison("", panels, rows, {}))
    figure.suptitle(
        "means of three seeds, 943 users; grey: models of RecBole; the last digit may be one off",
        fontsize=9,
    )
    return figure


def negatives() -> Figure:
    """HR@1 and NDCG@5 against K, a panel for each metric and candidate set."""
    runs, setting = read_results(HERE / "ml-100k" / "negatives" / "results.jsonl.gz"), "sample_num"
    comparisons = []
    for candidates in ("uni19", "pop19"):
        rows = []
        for name in dict.fromkeys(run["name"] for run in runs if setting in run["name"]):
            line, number = name.split(f", {setting} = ")
            rows.append(
                row(runs, name, {metric: (candidates, metric) for metric in ("HR@1", "NDCG@5")})
            )
            rows[-1].axis = (line, setting, int(number))
        comparisons.append(Comparison(candidates, ["HR@1", "NDCG@5"], rows, {}))
    return figures.sweep(comparisons, setting)


def read_results(file: Path) -> list[dict[str, Any]]:
    """The runs of a ``results.jsonl``, compressed or not."""
    content = file.read_bytes()
    lines = gzip.decompress(content) if file.suffix == ".gz" else content
    return [json.loads(line) for line in lines.splitlines()]


def row(runs: list[dict[str, Any]], name: str, columns: dict[str, tuple[str, str]]) -> Row:
    """A row whose only user is the mean: the files keep a run's means, and not its users.

    Args:
        columns: the candidate set and the metric of each name in the figure.
    """
    mine = [run for run in runs if run["name"] == name]
    last = [list(run["stages"].values())[-1]["candidates"] for run in mine]
    users = {
        shown: np.array([[stage[candidates]["test"][metric_key(metric)]] for stage in last])
        for shown, (candidates, metric) in columns.items()
    }
    return Row(
        name,
        baseline=False,
        axis=None,
        seeds=[run["seed"] for run in mine],
        users=users,
        lists={},
        user=pd.Index([0]),
        wall_s=0.0,
        cost={},
    )


if __name__ == "__main__":
    main()
