"""Tables for logs, pages and papers: Markdown, HTML, CSV and LaTeX. Names are text in each."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

if TYPE_CHECKING:
    from recbole_sdpo.report.comparison import Comparison, Row

NOTE = (
    "Best in bold, second best underlined; * differs from the best baseline (p < 0.05 after Holm's "
    "correction over the table; for metrics that are 0 or 1 McNemar's test, by sign flips with "
    "several seeds, else a paired t-test; "
    "over users, of these seeds' means, so that what other seeds would give is not in it)"
)


def markdown_text(text: str) -> str:
    """``text`` as Markdown shows it; underscores in words and an ``&`` alone mean nothing there."""
    special = r"[\\`*<\[~$|]|_(?!\w)|(?<![^\W_])_|&(?=#?\w+;)"
    return re.sub(special, lambda match: "\\" + match[0], text)


LATEX_TEXT = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # At the start of a line these would be options of the end of the one before.
    "[": "{[}",
    "*": "{*}",
}


def _latex(text: str) -> str:
    """``text`` as LaTeX sets it."""
    return "".join(LATEX_TEXT.get(c, c) for c in text)


class Marks(NamedTuple):
    """How a format writes the parts of a cell; ``best`` and ``second`` are format strings."""

    between: str
    star: str
    best: str
    second: str
    percent: str
    escape: Callable[[str], str]


MARKDOWN = Marks("±", "*", "**{}**", "<u>{}</u>", "%", markdown_text)
HTML = Marks("±", "*", "<b>{}</b>", "<u>{}</u>", "%", html.escape)
LATEX = Marks(r"$\pm$", r"$^{*}$", r"\textbf{{{}}}", r"\underline{{{}}}", r"\%", _latex)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up in a terminal; numbers get four decimals."""
    cells = [list(head)] + [
        [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
    width = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(size) for cell, size in zip(row, width)) + " |"
        for row in cells
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (size + 2) for size in width) + "|", *lines[1:]]
    )


def comparison_markdown(comparison: Comparison) -> str:
    """The table of a comparison in Markdown."""
    head, *rows = _cells(comparison, MARKDOWN)
    return markdown_table(head, rows)


def comparison_html(comparison: Comparison) -> str:
    """The table of a comparison in HTML."""
    return html_table(_cells(comparison, HTML))


def html_table(cells: Sequence[Sequence[str]]) -> str:
    """A table in HTML, the first of ``cells`` its head; each is HTML already."""
    lines = []
    for number, row in enumerate(cells):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def comparison_latex(comparison: Comparison) -> str:
    """The table of a comparison for LaTeX with the package booktabs."""
    head, *rows = (" & ".join(cells) + r" \\" for cells in _cells(comparison, LATEX))
    columns = "l" + "r" * (len(comparison.metrics) + 2)
    body = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(body)


def comparison_frame(comparison: Comparison) -> pd.DataFrame:
    """All numbers of a comparison, a row for each model and metric."""
    lines = []
    for row in comparison.rows:
        for metric in row.users:
            difference = row.differences.get(metric)
            lines.append(
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
    for name, means in comparison.floor.items():
        lines += [
            {"candidates": comparison.candidates, "model": name, "metric": metric, "mean": mean}
            for metric, mean in means.items()
        ]
    return pd.DataFrame(lines)


def _cells(comparison: Comparison, marks: Marks) -> list[list[str]]:
    """The head and a line for each row, as the format of ``marks`` writes them."""
    first, metrics = comparison.metrics[0], comparison.metrics
    head = [
        comparison.candidates,
        *metrics,
        f"{first} vs {comparison.best_baseline[first]}",
        "minutes",
    ]
    lines = [[marks.escape(cell) for cell in head]]
    for row in comparison.rows:
        better = (
            "" if math.isnan(row.improvement) else f"{100 * row.improvement:+.1f} {marks.percent}"
        )
        numbers = (_cell(comparison, row, metric, marks) for metric in metrics)
        lines.append([marks.escape(row.name), *numbers, better, f"{row.wall_s / 60:.1f}"])
    for name, means in comparison.floor.items():
        numbers = (f"{means[metric]:.4f}" if metric in means else "" for metric in metrics)
        lines.append([marks.escape(name), *numbers, "", ""])
    return lines


def _cell(comparison: Comparison, row: Row, metric: str, marks: Marks) -> str:
    if metric not in row.users:
        return ""
    std = row.std(metric)
    text = (
        f"{row.mean(metric):.4f}"
        + ("" if math.isnan(std) else f" {marks.between} {std:.4f}")
        + marks.star * row.significant(metric)
    )
    place = comparison.place(row, metric)
    return (
        marks.best.format(text) if place == 0 else marks.second.format(text) if place == 1 else text
    )
