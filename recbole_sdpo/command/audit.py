"""``recbole-sdpo audit``: do the candidate lists of a file give their targets away?"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from recbole.data import data_preparation

from recbole_sdpo import compat
from recbole_sdpo.command.run import read_settings
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.candidate_lists import (
    CandidateLists,
    Coder,
    KnownItems,
    ListRow,
    Numbers,
    kind_of,
    lists_of,
    read_lists,
)
from recbole_sdpo.data.catalogue import Catalogue, NoTitles
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.data.json_rows import json_rows
from recbole_sdpo.data.published import PHASES, Published, is_published
from recbole_sdpo.data.sequences import popularity
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.audit import ENOUGH, TOP, Audit, Lists, audit, in_words
from recbole_sdpo.files import user_path
from recbole_sdpo.output import show
from recbole_sdpo.report.table import markdown_table

HELP = "guess the targets of candidate lists without a history and a model"

LEAK = 3
"""Exit code where lists give their targets away; 1 and 2 are those of errors."""

EXAMPLES = """\
  recbole-sdpo audit lists.csv                           learned from its other phases, or halves
  recbole-sdpo audit lists.csv --dataset=ml-100k         popularity and titles, too
  recbole-sdpo audit test.json --valid=val.json --train=train.json       files of LLaRA

The exit code is 3 where a guesser is above what popularity explains, 1 where a file cannot be used,
and else 0.
Settings of the data, such as --data_path=data, follow as --name=value where --dataset is given."""


class Known(NamedTuple):
    """What is known of the items of a file.

    Attributes:
        items: gives their texts numbers.
        popularity: by these numbers, or None.
        title_length: the same.
    """

    items: Coder
    popularity: np.ndarray | None = None
    title_length: np.ndarray | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The files, and the dataset that they are of."""
    parser.add_argument(
        "test",
        metavar="file",
        help="candidate lists: .csv, .json or .jsonl, also JSON as LLaRA has it",
    )
    parser.add_argument("--valid", help="file of the validation lists, if they are in another")
    parser.add_argument("--train", help="file of the training lists, if they are in another")
    parser.add_argument("--dataset", help="the dataset of the lists, for popularity and titles")


def call(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Print a table, and a sentence on what it means; returns :data:`LEAK` where a guesser is above
    what popularity explains, and else 0.

    Raises:
        UserError: a file cannot be used, or there is one list.
    """
    compat.quiet_warnings()
    settings = read_settings(args, rest)
    if settings and not args.dataset:
        raise UserError(
            f"--{min(settings)} is for a dataset; give --dataset, too, or leave it out."
        )
    known = _of_dataset(args.dataset, settings) if args.dataset else Known(Numbers())
    files = {phase: user_path(of) for phase in PHASES if (of := getattr(args, phase))}
    for phase in ("valid", "train"):
        if phase in files and files[phase].resolve() == files["test"].resolve():
            raise UserError(
                f"--{phase}={getattr(args, phase)} is the file of the test; it must be another, as "
                "a guesser learns from it."
            )
    if _are_published(files.values()):
        parts, met = _published(files, known.items)
        if isinstance(known.items, Numbers):
            known = _of_titles(known.items, met)
    else:
        parts = _parts(files, known.items)
        if isinstance(known.items, Numbers) and len(train := parts["train"]):
            counts = np.bincount(train.target, minlength=len(known.items.of))
            known = known._replace(popularity=counts)
    lists = Lists(parts["test"].target, parts["test"].items)
    if len(lists) < 2:
        raise UserError(f"{args.test} has {len(lists)} list of the test; it must have two or more.")
    reference = _reference(parts, lists.items.shape[1])
    found = audit(lists, reference, known.popularity, known.title_length)
    show(_table(found, args.test, lists.items.shape[1]))
    return LEAK if any(guess.gives_away for guess in found.guesses) else 0


def _reference(parts: dict[str, CandidateLists], length: int) -> Lists | None:
    """The lists for validation and training, if there are such, of that many candidates."""
    alike = []
    for phase in ("valid", "train"):
        if phase in parts and len(part := parts[phase]):
            if part.items.shape[1] == length:
                alike.append(part)
            else:
                show(f"The {phase} lists are of another length, and are left out.")
    if not alike:
        return None
    return Lists(
        np.concatenate([part.target for part in alike]),
        np.concatenate([part.items for part in alike]),
    )


def _of_dataset(name: str, settings: dict[str, Any]) -> Known:
    with compat.no_arguments():
        config = RunConfig("Pop", name, config_dict=settings)
    dataset = create_dataset(config)
    own = config.settings
    try:
        catalogue = Catalogue.from_dataset(dataset, own.title_fields, own.title_article_first)
        lengths = np.array([len(title) for title in catalogue.titles])
    except NoTitles:
        if "title_fields" in settings:
            raise
        catalogue, lengths = Catalogue.without_titles(dataset), None
    items = KnownItems(dataset, catalogue)
    train_data, *_ = data_preparation(config, dataset)
    return Known(items, popularity(train_data._dataset), lengths)


def _are_published(files: Iterable[Path]) -> bool:
    """Are they of LLaRA or its kin, by their first rows?

    Raises:
        UserError: some are, and others are not.
    """
    kinds: dict[bool, Path] = {}
    for file in files:
        row = None if kind_of(file) == ".csv" else next(json_rows(file), None)
        kinds[isinstance(row, dict) and is_published(row)] = file
    if len(kinds) == 2:
        raise UserError(
            f"{kinds[True]} has titles in itemList, and {kinds[False]} has none; give files of one "
            "kind."
        )
    return True in kinds


def _published(
    files: dict[str, Path], items: Coder
) -> tuple[dict[str, CandidateLists], Counter[str]]:
    """The lists that an import would use, and how many rows of training have each title as target
    or in the history; prints which rows cannot be used."""
    published, met = Published(files), Counter[str]()

    def rows(phase: str) -> Iterator[ListRow]:
        for row in published.rows(phase):
            if phase == "train":
                met.update({*row.history, row.target})
            if row.candidates:
                yield ListRow(row.number, str(row.number), row.target, row.candidates, phase)

    parts = {phase: lists_of(rows(phase), file, Numbers(), items) for phase, file in files.items()}
    for note in published.notes():
        show(note)
    return parts, met


def _of_titles(items: Numbers, met: Counter[str]) -> Known:
    """Popularity as the training part has it, if there is one; and titles."""
    counts = np.array([met[title] for title in items.of]) if met else None
    return Known(items, counts, np.array([len(title) for title in items.of]))


def _parts(files: dict[str, Path], items: Coder) -> dict[str, CandidateLists]:
    """The lists of each phase, in a file for each or in one."""
    test = read_lists(files["test"], Numbers(), items)
    parts = {phase: test.of(phase) for phase in PHASES}
    for phase in files.keys() - {"test"}:
        if len(parts[phase]):
            raise UserError(
                f"--{phase}={files[phase]}: {files['test']} has lists of the phase {phase} "
                "already; leave it out."
            )
        parts[phase] = read_lists(files[phase], Numbers(), items, phase).of(phase)
        if not len(parts[phase]):
            raise UserError(
                f"--{phase}={files[phase]} has no lists of the phase {phase}; it must have some, "
                "or name no phases."
            )
    return parts


def _table(found: Audit, file: str, candidates: int) -> str:
    head = [
        "guesser",
        "HR@1",
        "95 %",
        f"NDCG@{TOP}",
        "95 %",
        "p: chance",
        "explained",
        "p: beyond",
    ]
    rows: list[list[object]] = [["chance", found.chance[0], "", found.chance[1], "", "", "", ""]]
    for guess in found.guesses:
        (hit, *hits), (ndcg, *ndcgs) = guess.hit, guess.ndcg
        ends = ["{:.3f} to {:.3f}".format(*of) for of in (hits, ndcgs)]
        beyond = [
            "" if guess.explained is None else guess.explained,
            "" if guess.p_beyond is None else in_words(guess.p_beyond),
        ]
        rows.append([guess.guesser, hit, ends[0], ndcg, ends[1], in_words(guess.p), *beyond])
    learned = "their other half" if found.halves else "other parts"
    lines = [
        f"{file}: {found.lists:,} lists of {candidates} candidates; guessers learned from "
        f"{found.reference:,} lists of {learned}.",
        "",
        markdown_table(head, rows),
        "",
    ]
    names = {guess.guesser for guess in found.guesses}
    for name, need in (
        ("popularity", "--dataset or --train"),
        ("title length", "a --dataset with titles"),
    ):
        if name not in names:
            lines.append(f"The guesser by {name} is left out; it needs {need}.")
    warnings = [f"warning: {text}" for text in found.warnings(Path(file).name)]
    by = "popularity explains" if found.knows_popularity else "items' shares as targets explain"
    few = f"Fewer than {ENOUGH} lists are too few to tell; p and the intervals are rough."
    end = few if found.lists < ENOUGH else f"No guesser is above what {by}."
    return "\n".join([*lines, *(warnings or [end])])
