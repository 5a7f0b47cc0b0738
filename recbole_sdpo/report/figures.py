"""Figures of an experiment, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator

from recbole_sdpo.evaluator.significance import interval
from recbole_sdpo.objectives import OBJECTIVES
from recbole_sdpo.report.comparison import Comparison, FinishedRun, Row
from recbole_sdpo.report.groups import in_order
from recbole_sdpo.report.table import PLAIN, metric_head

SMOOTHED = 0.05
"""Share of a stage's steps over which its curves are averaged: single batches are noisy."""

POINTS = 300
"""Points of a curve, at least, where it has as many: more of them only make the file large."""

LEGEND_LINE = 0.08
"""Inches that a legend below a figure takes for each run, two of which stand in a line."""

SHORT = 0.2
"""Share of a panel that a bar must fill to hold its number."""

SHORTEST_S = 1.0
"""Seconds of training where a scale of time begins: Pop takes less."""

PANELS_ACROSS = 4
"""Panels beside each other; more go below them."""

FEW_TARGETS = 30
"""Of a group: the interval of fewer is so long that it would make those of others a dot."""

LONGEST = 60
"""Letters of a name that a figure shows."""

CURVES = {
    "reward_positive": "reward of the positive",
    "reward_negative": "mean reward of the negatives",
    "margin": "margin to the best negative",
    "logp_positive": "log π of the positive",
    "accuracy": "targets above all their negatives",
    "kl": "KL from the reference, next token",
}


def bars(comparison: Comparison) -> Figure:
    """A panel for each metric, a bar for each row; whiskers: the standard deviation over seeds."""
    metrics, rows = comparison.metrics, comparison.rows
    lines = -(-len(metrics) // PANELS_ACROSS)
    across = -(-len(metrics) // lines)
    size = (3.6 * across + 1.6, 0.4 + lines * (0.8 + 0.32 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, across, sharey=True, squeeze=False).ravel()
    for spare in panels[len(metrics) :]:
        spare.remove()
    for axes, metric in zip(panels, metrics):
        spread = [row.std(metric) for row in rows]
        colours = ["tab:gray" if row.baseline else "tab:blue" for row in rows]
        axes.barh(
            range(len(rows)),
            [row.mean(metric) for row in rows],
            xerr=None if np.isnan(spread).all() else spread,
            color=colours,
        )
        longest = axes.get_xlim()[1]
        for place, row in enumerate(rows):
            if len(row.by_seed(metric)):
                mean = row.mean(metric)
                # Where the bar is too short for its number, the number is behind it.
                x, color = (0, "white") if mean > SHORT * longest else (mean, "black")
                text = f" {mean:.4f}" if mean < 10 else f" {mean:,.1f}"
                axes.text(x, place, text, va="center", color=color, fontsize=8)
        axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
        axes.set_xlabel(metric_head(metric, PLAIN))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(
        f"candidates {comparison.candidates}; "
        "grey: the baselines that the others are compared with",
        fontsize=9,
    )
    return figure


def sweep(comparisons: Sequence[Comparison], setting: str) -> Figure:
    """Each metric against the values of ``setting``: a line for each swept entry, and a panel for
    each metric and candidate set."""
    metrics = [*dict.fromkeys(metric for each in comparisons for metric in each.metrics)]
    size = (3.6 * len(metrics), 2.8 * len(comparisons))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(comparisons), len(metrics), squeeze=False)
    names = list(
        dict.fromkeys(
            row.axis[0] for row in comparisons[0].rows if row.axis and row.axis[1] == setting
        )
    )
    for comparison, line in zip(comparisons, panels):
        swept = [(*row.axis, row) for row in comparison.rows if row.axis and row.axis[1] == setting]
        # At equal distances: numbers by their size, others in the order of the file.
        ordered = [value for _, _, value, _ in swept]
        if all(type(value) in (int, float) for value in ordered):  # true and false are none
            ordered = sorted(ordered)
        values = list(dict.fromkeys(map(_tick, ordered)))
        for axes, metric in zip(line, metrics):
            if not any(len(row.by_seed(metric)) for *_, row in swept):
                axes.remove()
                continue
            for name in names:
                rows = {
                    values.index(_tick(value)): row for of, _, value, row in swept if of == name
                }
                _line(axes, rows, metric)
            axes.set_xticks(range(len(values)), map(_short, values))
            axes.set(xlabel=setting.split(".")[-1], ylabel=metric, title=comparison.candidates)
            axes.grid(alpha=0.3)
    for axes in figure.axes[:1]:  # a metric that no row has leaves no panel
        _legend(axes, axes, names)
    return figure


def against_time(comparisons: Sequence[Comparison]) -> Figure:
    """The first metric of each row against its minutes of training and validation, SFT included, a
    panel for each candidate set; whiskers: the 95 % :func:`interval` of the seeds' means."""
    metric, rows = comparisons[0].metrics[0], comparisons[0].rows
    size = (4.2 * len(comparisons) + 0.6, 3.4 + LEGEND_LINE * 2 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    for axes, comparison in zip(
        figure.subplots(1, len(comparisons), squeeze=False)[0], comparisons
    ):
        _cycle(axes, alpha=[1.0, 0.5])
        for row in comparison.rows:
            users = row.users[metric].mean(0)
            mean = users.mean()
            axes.errorbar(
                max(row.wall_s, SHORTEST_S) / 60,
                mean,
                yerr=np.abs(np.subtract(interval(users), mean))[:, None],
                marker="s" if row.baseline else "o",
                linestyle="none",
                elinewidth=1,
                label="row",
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(LogFormatter())  # the default writes formulas
        axes.set_title(f"candidates {comparison.candidates}", fontsize=9)
        axes.set(xlabel="minutes of training and validation", ylabel=metric)
        axes.grid(alpha=0.3)
    names = [row.name for row in rows]
    _legend(figure, figure.axes[0], names, loc="outside lower center", ncols=2)
    return figure


def in_groups(panels: Mapping[str, pd.DataFrame], label: str) -> Figure:
    """A panel for each grouping, by its heading: a metric in each group, with its 95 % interval,
    for each row.

    Args:
        panels: parts of a :func:`~recbole_sdpo.report.groups.group_frame`, of one metric.
        label: what is drawn.
    """
    names = list(dict.fromkeys(name for part in panels.values() for name in part["model"]))
    size = (3.6 * len(panels) + 1.2, 3.2 + LEGEND_LINE * 2 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    for axes, (heading, part) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()
    ):
        _cycle(axes, alpha=[1.0, 0.5])
        groups = in_order(part["group"])
        sizes = part.groupby("group")["targets"].max()
        for number, name in enumerate(names):
            row = part[part["model"] == name].set_index("group").reindex(groups)
            shift = 0.6 * ((number + 0.5) / len(names) - 0.5)  # side by side
            axes.errorbar(
                np.arange(len(groups)) + shift,
                row["mean"],
                yerr=[(row["mean"] - row["low"]).clip(0), (row["high"] - row["mean"]).clip(0)],
                marker="o",
                markersize=4,
                linestyle="none",
                elinewidth=1.2,
                label="row",
            )
        axes.set_xticks(
            range(len(groups)), [f"{group}\n{sizes[group]:,}" for group in groups], fontsize=8
        )
        axes.set_title(heading, fontsize=9)
        axes.set_xlabel("group, and its targets", fontsize=8)
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].set_ylabel(label)
    shown = pd.concat(panels.values())
    ends = shown["high"].where(shown["targets"] >= FEW_TARGETS)
    highest = (ends if ends.notna().any() else shown["high"]).max()
    top = 1.05 * np.nanmax([highest, shown["mean"].max(), np.finfo(float).eps])
    figure.axes[0].set_ylim(0, top)  # of all panels; a longer whisker of few targets is cut
    _legend(figure, figure.axes[0], names, loc="outside lower center", ncols=2)
    return figure


def _tick(value: Any) -> str:
    """1 and 1.0 are one."""
    return f"{value:.15g}" if type(value) is float else str(value)


def _line(axes: Axes, rows: dict[int, Row], metric: str) -> None:
    """A point for each of ``rows``, at its place."""
    places = sorted(rows)
    spread = [rows[place].std(metric) for place in places]
    axes.errorbar(
        places,
        [rows[place].mean(metric) for place in places],
        yerr=None if np.isnan(spread).all() else spread,
        marker="o",
        capsize=3,
        label="row",
    )


def _legend(owner: Figure | Axes, axes: Axes, names: Sequence[str], **place: Any) -> None:
    """A legend of what is drawn in ``axes``.

    The names come last: matplotlib leaves out a label that begins with an underscore.
    """
    handles, labels = axes.get_legend_handles_labels()
    legend = owner.legend(handles, labels, fontsize=8, **place)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(_short(name))


def _short(name: str) -> str:
    """``name``, or its beginning and its end, for a figure has no room for more."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]} … {name[-LONGEST // 2 :]}"


def curves(runs: Sequence[FinishedRun]) -> Figure:
    """What happens while aligning, by run: a panel for each of :data:`CURVES`."""
    figure = Figure(figsize=(13.5, 6.4 + LEGEND_LINE * len(runs)), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(2, 3).flat, CURVES.items()):
        _curve(axes, runs, column, label)
    _legend(figure, figure.axes[0], [run.name for run in runs], loc="outside lower center", ncols=2)
    return figure


def hardest_weight(runs: Sequence[FinishedRun]) -> Figure:
    """The hardest negative's weight in the gradient over training, against 1/K of equal weights."""
    figure = Figure(figsize=(5.4, 3.6 + LEGEND_LINE * len(runs)), layout="constrained")
    axes = figure.subplots()
    _curve(axes, runs, "hardest_negative_weight", "weight of the hardest negative")
    for number in sorted({_negatives(run.result["settings"]) for run in runs}):
        axes.axhline(1 / number, color="gray", linestyle=":", linewidth=1)
        axes.annotate(
            f"1/{number}",
            (1, 1 / number),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            color="gray",
        )
    _legend(figure, axes, [run.name for run in runs], loc="outside lower center", ncols=2)
    return figure


def _negatives(settings: Mapping[str, Any]) -> int:
    """How many negatives a target has, of which the objective may take one alone."""
    drawn = settings["train_neg_sample_args"]["sample_num"]
    return OBJECTIVES[settings["objective"]].taking(drawn)


def _curve(axes: Axes, runs: Sequence[FinishedRun], column: str, label: str) -> None:
    _cycle(axes, linestyle=["-", "--", ":"])
    for run in runs:
        steps = alignment_steps(run)
        smooth = steps[column].rolling(max(1, int(SMOOTHED * len(steps))), min_periods=1).mean()
        shown = slice(None, None, max(1, len(steps) // POINTS))
        axes.plot(steps["targets"][shown], smooth[shown], label="row", linewidth=1.2)
    axes.set(xlabel="targets seen in the second stage", ylabel=label)
    # 200k; all digits would run into each other.
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)


def _cycle(axes: Axes, **others: list[Any]) -> None:
    """There are ten colours; what they are drawn with comes after them."""
    axes.set_prop_cycle(cycler(**others) * rcParams["axes.prop_cycle"])


def alignment_steps(run: FinishedRun) -> pd.DataFrame:
    """The optimizer steps of a run's second stage."""
    return run.steps[run.steps["stage"] == "sdpo"]
