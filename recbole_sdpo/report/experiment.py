"""What an experiment leaves for a paper: tables, figures, and a page that holds them."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from recbole_sdpo.files import whole_file
from recbole_sdpo.report import figures
from recbole_sdpo.report.comparison import Comparison, FinishedRun
from recbole_sdpo.report.groups import GROUPINGS, group_frame, group_part, group_table
from recbole_sdpo.report.pairs import pair_frame, pair_table
from recbole_sdpo.report.table import (
    COST_NOTE,
    FLOOR_NOTE,
    LISTS_NOTE,
    NOTE,
    comparison_frame,
    comparison_html,
    comparison_latex,
    comparison_markdown,
    html_table,
    markdown_table,
    markdown_text,
)

RESULT_KEYS = (
    "model",
    "dataset",
    "seed",
    "stages",
    "candidates_sha256",
    "training_targets",
    "top10",
    "peak_memory_gib",
    "machine",
    "versions",
    "settings",
)
"""Of each run's ``result.json``, what ``results.jsonl`` has."""

ENDS: dict[str, dict[str, Any]] = {
    "png": {"format": "png", "dpi": 150},
    "svg": {"format": "svg", "metadata": {"Date": None}},
}
"""Files of a figure."""

PAGE_PNG: dict[str, Any] = {"format": "png", "dpi": 96}
"""The figure in the page."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2em .8em; border-bottom: 1px solid #ccc; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} img {{ max-width: 100% }}
pre {{ overflow: auto; background: #f5f5f5; padding: 1em }}
.warning {{ color: #a00 }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""

GROUPS_NOTE = (
    "In brackets stands the 95 % interval of the mean over targets. * differs from the best "
    "baseline of all targets (p < 0.05 after Holm's correction over all metrics, rows and groups "
    "of a candidate set and grouping; of the seeds' means, and no seed is counted)."
)

PAIRS_NOTE = (
    "In brackets stands the 95 % interval of the difference, behind it p of a paired test over "
    "users. * is p < 0.05 after Holm's correction over all pairs and metrics of a candidate set. "
    "Then comes how many seeds have a difference of that sign: the test does not know of seeds."
)

Section = tuple[str, list[list[list[str]]], str]
"""A heading, tables with a head and lines of text, and a note below them."""

Picture = dict[str, bytes]
"""A figure by the kinds of its files: those of :data:`ENDS`, and ``page``."""


def write_report(
    folder: Path,
    title: str,
    comparisons: Sequence[Comparison],
    runs: Sequence[FinishedRun],
    warnings: Sequence[str],
    origin: str,
    groupings: Sequence[str] = ("met",),
    pairs: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """Write ``table.md``, ``.csv`` and ``.tex``, ``groups.csv``, ``pairs.csv``, ``results.jsonl``,
    figures and ``report.html``.

    All are written beside their places first, and then take them together, so that they are of one
    report. Title, names, warnings and ``origin`` are text of users, in every format.

    Args:
        folder: made if it is not there; what it holds under these names is replaced.
        comparisons: one for each candidate set.
        warnings: sentences about what is not alike, and about what failed.
        origin: how the results came about: the command, versions, machine.
        groupings: names of :data:`GROUPINGS`, by which the first metric is shown.
        pairs: of rows that are tested against each other, too.

    Returns:
        ``warnings``, and a sentence for each figure that could not be drawn as it should be.
    """
    warnings = list(warnings)
    modes, first = [table.candidates for table in comparisons], comparisons[0].metrics[0]
    by_group, by_pair = group_frame(comparisons, runs, groupings), pair_frame(comparisons, pairs)
    drawings = _figures(comparisons, runs) | _group_figures(by_group, modes, groupings, first)
    pictures = {name: _draw(name, draw, warnings) for name, draw in drawings.items()}
    pictures = {name: picture for name, picture in pictures.items() if picture}
    note = (
        f"{NOTE}; {_sizes(comparisons[0])}. Minutes are of training and validation, SFT included."
    )
    if any(row.lists for comparison in comparisons for row in comparison.rows):
        note += f" {LISTS_NOTE}"
    if comparisons[0].costs:
        note += f" {COST_NOTE}"
    if any(comparison.floor for comparison in comparisons):
        note += f" {FLOOR_NOTE}"
    frame = pd.concat([comparison_frame(comparison) for comparison in comparisons])
    sections = [("Further pairs", [pair_table(by_pair, mode) for mode in modes], PAIRS_NOTE)]
    sections += [
        (
            GROUPINGS[name].heading,
            [group_table(by_group, mode, name, first) for mode in modes],
            GROUPS_NOTE,
        )
        for name in groupings
    ]
    sections = [(name, [*filter(None, tables)], note) for name, tables, note in sections]
    sections = [section for section in sections if section[1]]
    texts = {
        "report.html": _page(title, comparisons, sections, note, warnings, pictures, origin),
        "table.md": _markdown(title, comparisons, sections, note, warnings, origin),
        "groups.csv": by_group.to_csv(index=False, float_format="%.6g").removesuffix("\n"),
        "pairs.csv": by_pair.to_csv(index=False, float_format="%.6g").removesuffix("\n"),
        "table.tex": "\n\n".join(comparison_latex(comparison) for comparison in comparisons),
        "results.jsonl": "\n".join(json.dumps(_line(run)) for run in runs),
        "table.csv": frame.to_csv(index=False, float_format="%.6g").removesuffix("\n"),
    }
    files = {name: (text + "\n").encode() for name, text in texts.items()}
    for name, picture in pictures.items():
        files |= {f"{name}.{end}": picture[end] for end in ENDS}
    folder.mkdir(parents=True, exist_ok=True)
    before = _pictures_of(folder / "report.html")
    with ExitStack() as places:
        for name, content in files.items():
            places.enter_context(whole_file(folder / name)).write_bytes(content)
    for name in {*drawings, *before} - {*pictures}:  # those of another report
        for end in ENDS:
            (folder / f"{name}.{end}").unlink(missing_ok=True)
    return warnings


def _pictures_of(page: Path) -> list[str]:
    """The names of the figures that a report shows, if there is one."""
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    return re.findall(r"<img alt='([\w-]+)' src='data:", text)


def _page(
    title: str,
    comparisons: Sequence[Comparison],
    sections: Sequence[Section],
    note: str,
    warnings: Sequence[str],
    pictures: dict[str, Picture],
    origin: str,
) -> str:
    body = [comparison_html(comparison) for comparison in comparisons]
    body.append(f"<p class='note'>{html.escape(note)}</p>")
    body += [f"<p class='warning'>Warning: {html.escape(text)}</p>" for text in warnings]
    for heading, tables, below in sections:
        body.append(f"<h2>{html.escape(heading)}</h2>")
        body += [html_table([[*map(html.escape, line)] for line in table]) for table in tables]
        body.append(f"<p class='note'>{html.escape(below)}</p>")
    for name, picture in pictures.items():
        source = "data:image/png;base64," + base64.b64encode(picture["page"]).decode()
        heading, name = html.escape(name.replace("-", " ")), html.escape(name)
        body.append(f"<h2>{heading}</h2>\n<img alt='{name}' src='{source}'>")
    body.append(f"<pre>{html.escape(origin)}</pre>")
    return PAGE.format(title=html.escape(title), body="\n".join(body))


def _markdown(
    title: str,
    comparisons: Sequence[Comparison],
    sections: Sequence[Section],
    note: str,
    warnings: Sequence[str],
    origin: str,
) -> str:
    tables = [comparison_markdown(comparison) for comparison in comparisons]
    lines = [markdown_text(f"Warning: {text}") for text in warnings]
    further = []
    for name, parts, below in sections:
        further.append(f"## {name}")
        for table in parts:
            head, *rows = ([*map(markdown_text, line)] for line in table)
            further.append(markdown_table(head, rows))
        further.append(markdown_text(below))
    heading = f"# {markdown_text(title)}"
    return "\n\n".join([heading, *tables, note, *lines, *further, _fenced(origin)])


def _sizes(comparison: Comparison) -> str:
    row = max(comparison.rows, key=lambda row: len(row.seeds))
    seeds = len(row.seeds)
    return f"{len(row.user)} users, {seeds} seed{'s' * (seeds > 1)}"


def _figures(
    comparisons: Sequence[Comparison], runs: Sequence[FinishedRun]
) -> dict[str, Callable[[], Figure]]:
    """How each figure is drawn, by its name."""
    ways: dict[str, Callable[[], Figure]] = {
        f"bars-{table.candidates}": partial(figures.bars, table) for table in comparisons
    }
    timed = [table for table in comparisons if all(table.metrics[0] in r.users for r in table.rows)]
    if len(comparisons[0].rows) > 1 and timed:
        ways["time"] = partial(figures.against_time, timed)
    for setting in dict.fromkeys(row.axis[1] for row in comparisons[0].rows if row.axis):
        name = re.sub(r"[^\w-]+", "_", setting.split(".")[-1])  # of a file
        ways[f"by-{name}"] = partial(figures.sweep, comparisons, setting)
    first_seeds: dict[str, FinishedRun] = {}
    for run in runs:
        if len(figures.alignment_steps(run)):
            first_seeds.setdefault(run.name, run)
    if aligned := list(first_seeds.values()):
        ways["curves"] = partial(figures.curves, aligned)
        ways["hardest-negative"] = partial(figures.hardest_weight, aligned)
    return ways


def _group_figures(
    frame: pd.DataFrame, modes: Sequence[str], groupings: Sequence[str], metric: str
) -> dict[str, Callable[[], Figure]]:
    """A figure for each candidate set of which groups are known."""
    parts = {
        mode: {
            GROUPINGS[name].heading: part
            for name in groupings
            if not (part := group_part(frame, mode, name, metric)).empty
        }
        for mode in modes
    }
    return {
        f"groups-{mode}": partial(figures.in_groups, panels, f"{metric}, candidates {mode}")
        for mode, panels in parts.items()
        if panels
    }


def _draw(name: str, draw: Callable[[], Figure], warnings: list[str]) -> Picture:
    """The figure; nothing if it cannot be drawn, which costs no more than that figure."""
    files = {}
    # Names are text, not formulas; and a drawing made again has the same names within.
    style = {"text.parse_math": False, "svg.hashsalt": ""}
    try:
        with matplotlib.rc_context(style), catch_warnings(record=True) as heard:
            simplefilter("always")
            figure = draw()
            for kind, options in (*ENDS.items(), ("page", PAGE_PNG)):
                buffer = io.BytesIO()
                figure.savefig(buffer, **options)
                files[kind] = buffer.getvalue()
    # Whatever matplotlib raises: the runs behind the tables took hours.
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        warnings.append(f"the figure {name} could not be drawn: {what}")
        return {}
    if any("missing from" in str(warning.message) for warning in heard):
        warnings.append(
            f"the figure {name} has boxes for letters that matplotlib's font lacks; "
            "set font.family in a matplotlibrc."
        )
    return files


def _line(run: FinishedRun) -> dict:
    result = {key: run.result.get(key) for key in RESULT_KEYS}
    return {"name": run.name, "wall_s": run.wall_s, **result}


def _fenced(text: str) -> str:
    """``text`` as a block of Markdown, whatever backticks it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
