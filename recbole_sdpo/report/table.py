"""Tables for logs and papers: Markdown, CSV and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

if TYPE_CHECKING:
    from recbole_sdpo.report.comparison import Comparison, Row

NOTE = (
    "Best in bold, second best underlined; * differs from the best baseline (p < 0.05 after Holm's correction over the table; "
    "for metrics that are 0 or 1 McNemar's test, by sign flips with several seeds, else a paired t-test; "
    "over users, of these seeds' means, so that what other seeds would give is not in it)"
)


class Marks(NamedTuple):
    """How a format writes the parts of a cell; ``best`` and ``second`` are format strings."""

    between: str
    star: str
    best: str
    second: str
    percent: str


MARKDOWN = Marks("±", "*", "**{}**", "<u>{}</u>", "%")
LATEX = Marks(r"$\pm$", r"$^{*}$", r"\textbf{{{}}}", r"\underline{{{}}}", r"\%")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up in a terminal; numbers get four decimals."""
    cells = [list(head)] + [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    width = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(size) for cell, size in zip(row, width)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (size + 2) for size in width) + "|", *lines[1:]])


def comparison_markdown(comparison: Comparison) -> str:
    """The table of a comparison in Markdown."""
    return markdown_table(_head(comparison), [_cells(comparison, row, MARKDOWN) for row in comparison.rows])


def comparison_latex(comparison: Comparison) -> str:
    """The table of a comparison for LaTeX with the package booktabs."""
    rows = [[_escaped(name), *cells] for name, *cells in (_cells(comparison, row, LATEX) for row in comparison.rows)]
    head = [_escaped(name) for name in _head(comparison)]
    lines = [" & ".join(map(str, cells)) + r" \\" for cells in (head, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    body = [lines[0], r"\midrule", *lines[1:]]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"])


def comparison_frame(comparison: Comparison) -> pd.DataFrame:
    """All numbers of a comparison, a row for each model and metric."""
    found = []
    for row in comparison.rows:
        for metric in row.users:
            difference = row.differences.get(metric)
            found.append(
                {
                    "candidates": comparison.candidates,
                    "model": row.name,
                    "metric": metric,
                    "mean": row.mean(metric),
                    "std": row.std(metric),
                    "seeds": len(row.seeds),
                    "users": row.users[metric].shape[1],
                    "best_baseline": comparison.best_baseline[metric],
                    "difference": difference and difference.mean,
                    "low": difference and difference.low,
                    "high": difference and difference.high,
                    "test": difference and difference.test,
                    "p": difference and difference.p,
                    "p_holm": row.p.get(metric),
                    "train_s": row.wall_s,
                }
            )
    return pd.DataFrame(found)


def _head(comparison: Comparison) -> list[str]:
    first = comparison.metrics[0]
    return [comparison.candidates, *comparison.metrics, f"{first} vs {comparison.best_baseline[first]}", "minutes"]


def _cells(comparison: Comparison, row: Row, marks: Marks) -> list[str]:
    better = "" if math.isnan(row.improvement) else f"{100 * row.improvement:+.1f} {marks.percent}"
    return [row.name, *(_cell(comparison, row, metric, marks) for metric in comparison.metrics), better, f"{row.wall_s / 60:.1f}"]


def _cell(comparison: Comparison, row: Row, metric: str, marks: Marks) -> str:
    if metric not in row.users:
        return ""
    std = row.std(metric)
    text = f"{row.mean(metric):.4f}" + ("" if math.isnan(std) else f" {marks.between} {std:.4f}") + marks.star * row.significant(metric)
    place = comparison.place(row, metric)
    return marks.best.format(text) if place == 0 else marks.second.format(text) if place == 1 else text


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)
