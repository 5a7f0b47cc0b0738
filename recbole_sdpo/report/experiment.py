"""All that an experiment leaves for a paper, in one folder: tables, figures, and a page that holds them."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from recbole_sdpo.report import figures
from recbole_sdpo.report.comparison import Comparison, Finished
from recbole_sdpo.report.table import NOTE, comparison_frame, comparison_latex, comparison_markdown

KEPT = ("model", "dataset", "seed", "stages", "candidates_sha256", "training_targets", "peak_memory_gib", "machine", "versions", "settings")
"""Of each run's ``result.json``, what ``results.jsonl`` has."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ padding: .2em .8em; border-bottom: 1px solid #ccc; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} img {{ max-width: 100% }} pre {{ overflow: auto; background: #f5f5f5; padding: 1em }}
.warning {{ color: #a00 }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def write_report(
    folder: Path, title: str, comparisons: Sequence[Comparison], runs: Sequence[Finished], warnings: Sequence[str], made: str
) -> None:
    """Write ``table.md``, ``.csv`` and ``.tex``, ``results.jsonl``, figures as PNG and SVG, and ``report.html``.

    Args:
        folder: made if it is not there; what it holds under these names is replaced.
        comparisons: one for each candidate set.
        warnings: sentences about what is not alike, and about what failed.
        made: how: the command, versions, machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = [comparison_markdown(comparison) for comparison in comparisons]
    notes = [f"{NOTE}; {_sizes(comparisons[0])}. Minutes are of training, SFT included.", *(f"Warning: {text}" for text in warnings)]
    _write(folder / "table.md", "\n\n".join([f"# {title}", *tables, *notes, f"```\n{made}\n```"]))
    frame = pd.concat([comparison_frame(comparison) for comparison in comparisons])
    frame.to_csv(folder / "table.csv", index=False, float_format="%.6g")
    _write(folder / "table.tex", "\n\n".join(comparison_latex(comparison) for comparison in comparisons))
    _write(folder / "results.jsonl", "\n".join(json.dumps(_line(run)) for run in runs))
    drawn = _figures(comparisons, runs)
    with matplotlib.rc_context({"svg.hashsalt": ""}):  # else a drawing made again has other names within
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    body = [_html_table(comparison) for comparison in comparisons]
    body += [f"<p class='{'warning' if text.startswith('Warning') else 'note'}'>{html.escape(text)}</p>" for text in notes]
    body += [f"<h2>{name.replace('-', ' ')}</h2>\n<img alt='{name}' src='{_embedded(figure)}'>" for name, figure in drawn.items()]
    _write(folder / "report.html", PAGE.format(title=html.escape(title), body="\n".join([*body, f"<pre>{html.escape(made)}</pre>"])))


def _sizes(comparison: Comparison) -> str:
    row = max(comparison.rows, key=lambda row: len(row.seeds))
    seeds = len(row.seeds)
    return f"{len(row.user)} users, {seeds} seed{'s' * (seeds > 1)}"


def _figures(comparisons: Sequence[Comparison], runs: Sequence[Finished]) -> dict[str, Figure]:
    drawn = {f"bars-{comparison.candidates}": figures.bars(comparison) for comparison in comparisons}
    for setting in dict.fromkeys(row.axis[1] for row in comparisons[0].rows if row.axis):
        drawn[f"by-{setting.split('.')[-1]}"] = figures.sweep(comparisons, setting)
    first = {run.name: run for run in reversed(runs) if run.steps is not None and len(figures.alignment_steps(run))}
    aligned = [run for run in reversed(first.values())]
    if aligned:
        drawn |= {"curves": figures.curves(aligned), "hardest-negative": figures.hardest_weight(aligned)}
    return drawn


def _line(run: Finished) -> dict:
    return {"name": run.name, "train_s": run.wall_s, **{key: run.result[key] for key in KEPT}}


def _html_table(comparison: Comparison) -> str:
    """The Markdown table's cells, as HTML."""
    lines = comparison_markdown(comparison).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    made = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        made.append("<tr>" + "".join(f"<{tag}>{_marked(cell)}</{tag}>" for cell in row) + "</tr>")
    return "<table>\n" + "\n".join(made) + "\n</table>"


def _marked(cell: str) -> str:
    text = html.escape(cell).replace("&lt;u&gt;", "<u>").replace("&lt;/u&gt;", "</u>")
    return f"<b>{text[2:-2]}</b>" if text.startswith("**") else text


def _embedded(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=96, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")
