"""Prompts as rows of text units, and which targets are asked after which of their units."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from recbole_sdpo.data.sequences import Sequences
from recbole_sdpo.errors import UserError
from recbole_sdpo.files import config_file
from recbole_sdpo.ragged import Ragged, places
from recbole_sdpo.values import read_yaml

TEMPLATE_FOLDER = Path(__file__).parents[1] / "properties" / "prompts"
SLOTS = ("{history}", "{candidates}")


def template_file(name: str) -> Path:
    """Where the templates lie that ``prompt_templates`` names, if there are such."""
    return (
        config_file(name)
        if Path(name).suffix in (".yaml", ".yml")
        else TEMPLATE_FOLDER / f"{name}.yaml"
    )


@dataclass(frozen=True)
class Templates:
    """Prompt templates of one domain.

    Attributes:
        header: what opens a prompt of the ``history`` style.
        candidates: templates of the ``candidates`` style; each has ``{history}`` and
            ``{candidates}`` once. The first is the one used at evaluation.
    """

    header: str
    candidates: tuple[str, ...]

    @classmethod
    def load(cls, name: str) -> Templates:
        """Read a domain that ships here, such as ``movies``, or a YAML file of one's own.

        Raises:
            UserError: there is no such domain or file, or it does not hold a header and templates.
        """
        path = template_file(name)
        domains = sorted(file.stem for file in TEMPLATE_FOLDER.glob("*.yaml"))
        if not path.is_file():
            known = ", ".join(domains)
            if Path(name).suffix in (".yaml", ".yml"):
                raise UserError(f"prompt_templates={name!r}: there is no file {path}.")
            raise UserError(f"prompt_templates={name!r} must be one of {known}, or a .yaml file.")
        content = read_yaml(path, f"prompt_templates={name!r}")
        header, templates = content.get("header"), content.get("candidates")
        if (
            set(content) != {"header", "candidates"}
            or not isinstance(templates, list)
            or not templates
            or not all(isinstance(text, str) for text in (header, *templates))
        ):
            raise UserError(
                f"prompt_templates={name!r} must hold the keys 'header' (text) and 'candidates' "
                "(a list of texts)."
            )
        for template in templates:
            if any(template.count(slot) != 1 for slot in SLOTS):
                raise UserError(
                    f"prompt_templates={name!r}: each of {SLOTS} must occur once in {template!r}."
                )
            if template.lstrip().startswith(SLOTS):
                raise UserError(f"prompt_templates={name!r}: {template!r} must begin with text.")
        return cls(
            content["header"].strip() + "\n", tuple(t.strip() + "\n" for t in content["candidates"])
        )

    def of_style(self, style: str) -> Templates:
        """What prompts of ``history`` or ``candidates`` style use, so that nothing else comes
        into a vocabulary made for them."""
        return Templates(self.header, () if style == "history" else self.candidates)


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, as units, and the targets asked of them.

    A unit is a title with its terminator, numbered by its item, or a piece of a template, numbered
    from ``Units.header`` on.

    Attributes:
        trunks: the units of each trunk.
        tree: int64 ``[T]``, the trunk of each target.
        before: int64 ``[T]``, how many of the trunk's units are the target's prompt.
        target: int64 ``[T]``, the item asked for.
        user: int64 ``[T]``.
    """

    trunks: Ragged
    tree: np.ndarray
    before: np.ndarray
    target: np.ndarray
    user: np.ndarray

    def __len__(self) -> int:
        return len(self.trunks)

    def select(self, trees: np.ndarray) -> Prompts:
        """The prompts of the given trees, in that order, with their targets."""
        targets = self._targets.take(trees)
        return Prompts(
            self.trunks.take(trees),
            targets.owner,
            self.before[targets.values],
            self.target[targets.values],
            self.user[targets.values],
        )

    def target_index(self, trees: np.ndarray) -> np.ndarray:
        """Which targets, by number in this batch, ``select(trees)`` holds, in its order."""
        return self._targets.take(trees).values

    @cached_property
    def _targets(self) -> Ragged:
        """The targets of each tree. Once, for a training set selects as often as it has batches."""
        return Ragged.grouped(np.arange(len(self.tree)), self.tree, len(self))


class Units:
    """The numbering of units: items (0, the padding, included), then the pieces of the templates.

    Attributes:
        items: number of items.
        header: the unit of the ``history`` style's header, which is the first piece.
        pieces: texts of the pieces.
        templates: for each template of the ``candidates`` style, its units and slots in order.
    """

    def __init__(self, items: int, templates: Templates) -> None:
        self.items = self.header = items
        self.pieces: list[str] = [templates.header]
        self.templates: list[list[int | str]] = []
        for template in templates.candidates:
            layout: list[int | str] = []
            for part in re.split("|".join(f"({re.escape(slot)})" for slot in SLOTS), template):
                if part in SLOTS:
                    layout.append(part)
                elif part:
                    layout.append(items + len(self.pieces))
                    self.pieces.append(part)
            self.templates.append(layout)


def history_windows(sequences: Sequences, window: int, header: int) -> Prompts:
    """``history`` prompts in which every training target is asked for once.

    A window holds at most ``window`` titles and moves on by half of that, so that each target has a
    history of between half a window and a window, shorter only at the start of its sequence.

    Args:
        window: titles in a window, at least 2.
        header: the unit that opens each prompt.
    """
    step = window // 2
    length, opening = sequences.items.lengths, sequences.history
    # The first window of a sequence ends here, with at least one target; each further one ends a
    # step later.
    first_stop = np.minimum(np.maximum(window, opening + 1), length)
    windows = 1 - (first_stop - length) // step
    owner, number = np.repeat(np.arange(len(length)), windows), places(windows)
    stop = np.minimum(first_stop[owner] + number * step, length[owner])
    first_target = np.where(number == 0, opening[owner], first_stop[owner] + (number - 1) * step)
    start = np.maximum(np.where(number == 0, stop - window, first_target - (window - step)), 0)
    shown = sequences.items.cut(owner, start, stop - start)
    asked = stop - first_target
    tree = np.repeat(np.arange(len(owner)), asked)
    place = places(asked) + (first_target - start)[tree]
    return Prompts(
        _with_header(shown, header),
        tree,
        place + 1,
        shown.values[shown.starts[tree] + place],
        sequences.user[owner][tree],
    )


def history_prompts(
    histories: Ragged, target: np.ndarray, user: np.ndarray, header: int
) -> Prompts:
    """One ``history`` prompt for each row of ``histories``."""
    trunks = _with_header(histories, header)
    return Prompts(trunks, np.arange(len(trunks)), trunks.lengths, target, user)


def candidate_prompts(
    histories: Ragged,
    candidates: Ragged,
    target: np.ndarray,
    user: np.ndarray,
    units: Units,
    template: np.ndarray,
) -> Prompts:
    """One ``candidates`` prompt for each row: template, history and the candidates in the order
    given.

    Args:
        candidates: of each row, already shuffled.
        template: int64 ``[rows]``, which of the templates to use.
    """
    by_template, rows = [], []
    for number, layout in enumerate(units.templates):
        mine = np.flatnonzero(template == number)
        fill = {"{history}": histories.take(mine), "{candidates}": candidates.take(mine)}
        parts = [
            fill[p] if isinstance(p, str) else Ragged.from_matrix(np.full((len(mine), 1), p))
            for p in layout
        ]
        by_template.append(parts[0].beside(*parts[1:]))
        rows.append(mine)
    trunks = Ragged.stack(by_template).take(np.argsort(np.concatenate(rows)))
    return Prompts(trunks, np.arange(len(trunks)), trunks.lengths, target, user)


def _with_header(rows: Ragged, header: int) -> Ragged:
    return Ragged(np.insert(rows.values, rows.starts, header), rows.lengths + 1)


def batches(sizes: np.ndarray, budget: int, order: np.ndarray | None = None) -> list[np.ndarray]:
    """Cut rows into batches whose padded size (longest row times rows) stays within ``budget``; a
    longer row goes alone.

    Args:
        sizes: int ``[rows]``, tokens in each row.
        order: int64, the rows to use, in the order to take them; sorted by size if left out.
    """
    rows = np.argsort(sizes, kind="stable") if order is None else order
    cut, first = [], 0
    while first < len(rows):
        # No more than ``budget`` rows of one token each can fit.
        longest = np.maximum.accumulate(sizes[rows[first : first + budget]])
        padded = longest * np.arange(1, len(longest) + 1)
        stop = first + max(1, int(np.searchsorted(padded, budget, side="right")))
        cut.append(rows[first:stop])
        first = stop
    return cut
