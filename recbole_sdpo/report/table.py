"""Tables for logs, pages and papers: Markdown, HTML, CSV and LaTeX. Names are text in each."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd

from recbole_sdpo.checks.metrics import is_of_lists
from recbole_sdpo.evaluator.lists import OF_LISTS
from recbole_sdpo.report.comparison import COST, Comparison, Row, agreeing

NOTE = (
    "Best in bold, second best underlined; * differs from the best baseline (p < 0.05 after Holm's "
    "correction over the table; for metrics that are 0 or 1 McNemar's test, by sign flips with "
    "several seeds, else a paired t-test; "
    "over users, of these seeds' means, so that what other seeds would give is not in it; in "
    "brackets behind it, how many seeds have a difference of its sign, if not all have)"
)

LISTS_NOTE = (
    "An arrow says which way is better for a metric of the lists that all users get. It is one "
    "number, so that no test over users is made, and no value of it is marked: a random ranking "
    "is best in most of them."
)

COST_NOTE = (
    "Targets/s are of training epochs alone. GiB is the most that the process took: of the GPU "
    "where there is one, else of memory. Top 10 is one user's ten best of the catalogue, the "
    "median over up to 32 users one at a time."
)


FLOOR_NOTE = (
    "Rows with audit are guessers that see no history. What one of them is above popularity is in "
    "result.json, and a warning says so where that is more than chance."
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
    up: str
    down: str
    escape: Callable[[str], str]


MARKDOWN = Marks("±", "*", "**{}**", "<u>{}</u>", "%", "↑", "↓", markdown_text)
HTML = Marks("±", "*", "<b>{}</b>", "<u>{}</u>", "%", "↑", "↓", html.escape)
LATEX = Marks(
    r"$\pm$",
    r"$^{*}$",
    r"\textbf{{{}}}",
    r"\underline{{{}}}",
    r"\%",
    r"$\uparrow$",
    r"$\downarrow$",
    _latex,
)
PLAIN = Marks("±", "*", "{}", "{}", "%", "↑", "↓", str)


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
    head, *rows = _with_published(comparison, MARKDOWN)
    notes = [f"({number}) {source}" for number, source in _sources(comparison, MARKDOWN)]
    return "\n\n".join([markdown_table(head, rows), *notes])


def comparison_html(comparison: Comparison) -> str:
    """The table of a comparison in HTML."""
    notes = (
        f"\n<p class='note'>({number}) {source}</p>"
        for number, source in _sources(comparison, HTML)
    )
    return "".join([html_table(_with_published(comparison, HTML)), *notes])


def html_table(cells: Sequence[Sequence[str]]) -> str:
    """A table in HTML, the first of ``cells`` its head; each is HTML already."""
    lines = []
    for number, row in enumerate(cells):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def comparison_latex(comparison: Comparison) -> str:
    """The table of a comparison for LaTeX with the package booktabs."""
    table = _with_published(comparison, LATEX)
    head, *rows = (" & ".join(cells) + r" \\" for cells in table)
    columns = "l" + "r" * (len(table[0]) - 1)
    body = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    for number, source in _sources(comparison, LATEX):
        body.append(rf"\par{{\footnotesize ({number}) {source}}}")
    return "\n".join(body)


def comparison_frame(comparison: Comparison) -> pd.DataFrame:
    """All numbers of a comparison, a row for each model and metric."""
    lines = []
    for row in comparison.rows:
        for metric in (*row.users, *row.lists):
            difference = row.differences.get(metric)
            lines.append(
                {
                    "candidates": comparison.candidates,
                    "model": row.name,
                    "metric": metric,
                    "mean": row.mean(metric),
                    "std": row.std(metric),
                    "seeds": len(row.seeds),
                    "users": len(row.user),
                    "best_baseline": comparison.best_baseline.get(metric),
                    "difference": difference and difference.mean,
                    "low": difference and difference.low,
                    "high": difference and difference.high,
                    "test": difference and difference.test,
                    "p": difference and difference.p,
                    "p_holm": row.p.get(metric),
                    "by_seed": signed(row.differences_by_seed.get(metric, [])),
                    "wall_s": row.wall_s,
                    **row.cost,
                }
            )
    for name, means in comparison.floor.items():
        lines += [
            {"candidates": comparison.candidates, "model": name, "metric": metric, "mean": mean}
            for metric, mean in means.items()
        ]
    frame = pd.DataFrame(lines)
    if comparison.published:
        theirs = {
            (name, one.metric): (one.value, one.source)
            for name, values in comparison.published.items()
            for one in values
        }
        pairs = zip(frame["model"], frame["metric"], strict=True)
        frame[["published", "source"]] = [theirs.get(pair, (None, None)) for pair in pairs]
    return frame


def signed(differences: Sequence[float]) -> str:
    """Each with its sign and four decimals, separated by blanks."""
    return " ".join(f"{difference:+.4f}" for difference in differences)


def _sources(comparison: Comparison, marks: Marks) -> list[tuple[int, str]]:
    """Where published values stand, each with its number from 1."""
    sources = dict.fromkeys(
        one.source for row in comparison.rows for one in comparison.published.get(row.name, ())
    )
    return [(number, marks.escape(source)) for number, source in enumerate(sources, 1)]


def _with_published(comparison: Comparison, marks: Marks) -> list[list[str]]:
    """:func:`_cells`, and before the minutes what others published, if there is anything."""
    lines = _cells(comparison, marks)
    number = {source: number for number, source in _sources(comparison, marks)}
    if not number:
        return lines
    column = ["published"]
    for row in comparison.rows:
        theirs = (
            f"{marks.escape(one.metric)} {one.value:g} ({number[marks.escape(one.source)]})"
            for one in comparison.published.get(row.name, ())
        )
        column.append(", ".join(theirs))
    column += [""] * len(comparison.floor)
    place = lines[0].index("minutes")
    return [[*line[:place], cell, *line[place:]] for line, cell in zip(lines, column, strict=True)]


def _cells(comparison: Comparison, marks: Marks) -> list[list[str]]:
    """The head and a line for each row, as the format of ``marks`` writes them."""
    first, metrics = comparison.metrics[0], comparison.metrics
    versus = f"{first} vs {comparison.best_baseline[first]}"
    costs = COST if comparison.costs else {}
    last = (versus, "minutes", *(title for title, _ in costs.values()))
    lines = [
        [
            marks.escape(comparison.candidates),
            *(metric_head(metric, marks) for metric in metrics),
            *map(marks.escape, last),
        ]
    ]
    for row in comparison.rows:
        better = (
            "" if math.isnan(row.improvement) else f"{100 * row.improvement:+.1f} {marks.percent}"
        )
        numbers = (_cell(comparison, row, metric, marks) for metric in metrics)
        spent = (_number(row.cost[key], kind) for key, (_, kind) in costs.items())
        minutes = f"{row.wall_s / 60:.1f}"
        lines.append([marks.escape(row.name), *numbers, better, minutes, *spent])
    for name, means in comparison.floor.items():
        numbers = (f"{means[metric]:.4f}" if metric in means else "" for metric in metrics)
        lines.append([marks.escape(name), *numbers, "", "", *("" for _ in costs)])
    return lines


def _number(value: float, kind: str) -> str:
    return "" if math.isnan(value) else format(value, kind)


def metric_head(metric: str, marks: Marks) -> str:
    """A metric over its column, with an arrow where it is of the lists that all users get."""
    if not is_of_lists(metric):
        return marks.escape(metric)
    lower = OF_LISTS[metric.lower().partition("@")[0]].smaller
    return f"{marks.escape(metric)} {marks.down if lower else marks.up}"


def _cell(comparison: Comparison, row: Row, metric: str, marks: Marks) -> str:
    if not len(row.by_seed(metric)):
        return ""
    std = row.std(metric)
    text = (
        f"{row.mean(metric):.4f}"
        + ("" if math.isnan(std) else f" {marks.between} {std:.4f}")
        + marks.star * row.significant(metric)
    )
    if metric in row.lists:
        return text
    place = comparison.place(row, metric)
    form = marks.best if place == 0 else marks.second if place == 1 else "{}"
    # In Markdown a star before anything but the end of what is bold would end it.
    return form.format(text) + (_disagreement(row, metric) if row.significant(metric) else "")


def _disagreement(row: Row, metric: str) -> str:
    """How many seeds have a difference of the sign of the tested one, unless all have."""
    seeds = row.differences_by_seed[metric]
    count = agreeing(row.differences[metric].mean, seeds)
    return "" if seeds and count == len(seeds) else f" ({count}/{len(seeds)})"
