"""All that an experiment leaves for a paper, in one folder: tables, figures, and a page that holds them."""

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
from warnings import catch_warnings, simplefilter

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from recbole_sdpo.files import whole_file
from recbole_sdpo.report import figures
from recbole_sdpo.report.comparison import Comparison, Finished
from recbole_sdpo.report.table import (
    NOTE,
    comparison_frame,
    comparison_html,
    comparison_latex,
    comparison_markdown,
    markdown_text,
)

KEPT = ("model", "dataset", "seed", "stages", "candidates_sha256", "training_targets", "peak_memory_gib", "machine", "versions", "settings")
"""Of each run's ``result.json``, what ``results.jsonl`` has."""

ENDS = {"png": {"format": "png", "dpi": 150}, "svg": {"format": "svg", "metadata": {"Date": None}}}
"""Files of a figure."""

PAGE_PNG = {"format": "png", "dpi": 96}
"""The figure in the page."""

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
) -> list[str]:
    """Write ``table.md``, ``.csv`` and ``.tex``, ``results.jsonl``, figures as PNG and SVG, and ``report.html``.

    All are written beside their places first, and then take them together, so that they are of one report.

    Args:
        folder: made if it is not there; what it holds under these names is replaced.
        comparisons: one for each candidate set.
        warnings: sentences about what is not alike, and about what failed.
        made: how: the command, versions, machine.

    Returns:
        ``warnings``, and a sentence for each figure that could not be drawn, or not as it should be.
    """
    warnings = list(warnings)
    drawn = {name: _draw(name, draw, warnings) for name, draw in _figures(comparisons, runs).items()}
    pictures = {name: files for name, files in drawn.items() if files}
    notes = [f"{NOTE}; {_sizes(comparisons[0])}. Minutes are of training, SFT included."]
    told = [f"Warning: {text}" for text in warnings]
    body = [comparison_html(comparison) for comparison in comparisons]
    body += [f"<p class='note'>{html.escape(text)}</p>" for text in notes]
    body += [f"<p class='warning'>{html.escape(text)}</p>" for text in told]
    body += [f"<h2>{name.replace('-', ' ')}</h2>\n<img alt='{name}' src='{_embedded(files['page'])}'>" for name, files in pictures.items()]
    page = PAGE.format(title=html.escape(title), body="\n".join([*body, f"<pre>{html.escape(made)}</pre>"]))
    frame = pd.concat([comparison_frame(comparison) for comparison in comparisons])
    texts = {
        "report.html": page,
        "table.md": "\n\n".join(
            [
                f"# {markdown_text(title)}",
                *(comparison_markdown(comparison) for comparison in comparisons),
                *notes,
                *map(markdown_text, told),
                _fenced(made),
            ]
        ),
        "table.tex": "\n\n".join(comparison_latex(comparison) for comparison in comparisons),
        "results.jsonl": "\n".join(json.dumps(_line(run)) for run in runs),
        "table.csv": frame.to_csv(index=False, float_format="%.6g").removesuffix("\n"),
    }
    files = {name: (text + "\n").encode() for name, text in texts.items()}
    files |= {f"{name}.{end}": picture[end] for name, picture in pictures.items() for end in ENDS}
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as places:
        for name, content in files.items():
            places.enter_context(whole_file(folder / name)).write_bytes(content)
    for name in drawn.keys() - pictures.keys():  # those of another report
        for end in ENDS:
            (folder / f"{name}.{end}").unlink(missing_ok=True)
    return warnings


def _sizes(comparison: Comparison) -> str:
    row = max(comparison.rows, key=lambda row: len(row.seeds))
    seeds = len(row.seeds)
    return f"{len(row.user)} users, {seeds} seed{'s' * (seeds > 1)}"


def _figures(comparisons: Sequence[Comparison], runs: Sequence[Finished]) -> dict[str, Callable[[], Figure]]:
    """How each figure is drawn, by its name."""
    ways = {f"bars-{comparison.candidates}": partial(figures.bars, comparison) for comparison in comparisons}
    for setting in dict.fromkeys(row.axis[1] for row in comparisons[0].rows if row.axis):
        ways[f"by-{setting.split('.')[-1]}"] = partial(figures.sweep, comparisons, setting)
    first = {run.name: run for run in reversed(runs) if run.steps is not None and len(figures.alignment_steps(run))}
    aligned = [run for run in reversed(first.values())]
    if aligned:
        ways |= {"curves": partial(figures.curves, aligned), "hardest-negative": partial(figures.hardest_weight, aligned)}
    return ways


def _draw(name: str, draw: Callable[[], Figure], warnings: list[str]) -> dict[str, bytes]:
    """The figure as PNG and SVG, and as PNG for the page; nothing if it cannot be drawn, which costs no more than that figure."""
    files = {}
    try:
        # Names are text, not formulas; and a drawing made again has the same names within.
        with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": ""}), catch_warnings(record=True) as heard:
            simplefilter("always")
            figure = draw()
            for kind, options in (*ENDS.items(), ("page", PAGE_PNG)):
                buffer = io.BytesIO()
                figure.savefig(buffer, **options)
                files[kind] = buffer.getvalue()
    except Exception as error:  # matplotlib's, of whatever kind: the runs behind the tables took hours
        warnings.append(f"the figure {name} could not be drawn: {type(error).__name__}: {' '.join(str(error).split())}")
        return {}
    if any("missing from" in str(warning.message) for warning in heard):
        warnings.append(f"the figure {name} has boxes for letters that matplotlib's font lacks; set font.family in a matplotlibrc.")
    return files


def _line(run: Finished) -> dict:
    return {"name": run.name, "train_s": run.wall_s, **{key: run.result[key] for key in KEPT}}


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _fenced(text: str) -> str:
    """``text`` as a block of Markdown, whatever backticks it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
