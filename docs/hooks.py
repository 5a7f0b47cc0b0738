"""For MkDocs, as it builds: tables of the settings' declarations, the notebook, and names in
docstrings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from recbole_sdpo.settings import SUITED, table

SETTINGS = re.compile(r"<!-- settings: ([\w ]+) -->")
"""Stands for the table of these settings; ``sft_…`` stands for that of the second stage, too."""

SUITED_TO = "<!-- what suits a backbone -->"
"""Stands for the table of what a stage takes where nothing is given."""

CELLS = re.compile(r"<!-- cells of ([\w.]+) -->")
"""Stands for the cells of this notebook, which lies beside this file."""

ROLE = re.compile(r":(?:func|meth|class|data|mod):(?=<code>)")
"""In a docstring, what a name in backticks is."""

CODE = re.compile(r"(?<=<code>)[^<]*(?=</code>)")
"""Code without colours: a few words in a line, or a block of commands."""

HYPHENED = re.compile(r"(?<!\S)\S*-\S*")
"""A word that a browser would break at a hyphen, such as an option."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables and the notebook in."""
    markdown = SETTINGS.sub(lambda found: settings_table(found[1].split()), markdown)
    markdown = CELLS.sub(lambda found: cells(Path(__file__).with_name(found[1])), markdown)
    return markdown.replace(SUITED_TO, suited_table())


def on_page_content(html: str, **_: Any) -> str:
    """Leave out what Sphinx alone reads: roles, and the second colon before a block of code. Keep
    options in one line."""
    html = ROLE.sub("", html).replace("::</p>", ":</p>")
    return CODE.sub(lambda code: HYPHENED.sub(lambda word: whole(word[0]), code[0]), html)


def whole(word: str) -> str:
    """Marked for extra.css, unless it is longer than a narrow page is wide."""
    return f'<span class="whole">{word}</span>' if len(word) <= 40 else word


def settings_table(names: list[str]) -> str:
    """Those rows of ``recbole-sdpo settings``; what suits a backbone has a table of its own.

    Raises:
        KeyError: there is no such setting.
    """
    head, line, *rows = table(suited=False).replace("<", "&lt;").splitlines()
    by_name = {row.split("`")[1]: row for row in rows}
    shown = []
    for name in names:
        second = re.sub("^sft_", "sdpo_", name)
        both = f"`{name}`, `{second}`" if second != name and second in by_name else f"`{name}`"
        shown.append(by_name[name].replace(f"`{name}`", both, 1))
    return "\n".join([head, line, *shown])


def cells(notebook: Path) -> str:
    """The text of a notebook, and its code in fences. Its title is that of the page."""
    _, text = "\n\n".join(
        source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        for source in ["".join(cell["source"])]
    ).split("\n", 1)
    return text


def suited_table() -> str:
    """The defaults that follow from the backbone."""
    lines = [
        "| setting | `scratch` | a pretrained backbone | the same, `item_tokens=whole` |",
        "|---|---|---|---|",
    ]
    for stage in ("sft", "sdpo"):
        for name in dict.fromkeys([key for kind in SUITED.values() for key in kind[stage]]):
            values = (SUITED[kind][stage].get(name) for kind in SUITED)
            otherwise = "by the device" if name == "tokens_per_batch" else "those of one batch"
            cells = (otherwise if value is None else f"`{value}`" for value in values)
            lines.append(f"| `{stage}_{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)
