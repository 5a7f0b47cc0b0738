"""``recbole-sdpo audit``: do the candidate lists of a file give their targets away?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recbole_sdpo import compat
from recbole_sdpo.command.run import read_settings
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.candidate_lists import (
    CandidateLists,
    Coder,
    KnownItems,
    Numbers,
    read_lists,
)
from recbole_sdpo.data.catalogue import Catalogue, NoTitles
from recbole_sdpo.data.dataset import create_dataset, data_preparation
from recbole_sdpo.data.sequences import popularity
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.audit import ENOUGH, TOP, Audit, Lists, audit, in_words
from recbole_sdpo.files import user_path
from recbole_sdpo.report.table import markdown_table

HELP = "guess the targets of candidate lists without a history and a model"

EXAMPLES = """\
  recbole-sdpo audit lists.csv                           learned from its other phases, or halves
  recbole-sdpo audit lists.csv --dataset=ml-100k         popularity and titles, too
  recbole-sdpo audit test.json --valid=val.json --train=train.json       files of LLaRA

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
        "file", help="candidate lists: .csv, .json or .jsonl, also JSON as LLaRA has it"
    )
    parser.add_argument("--valid", help="file of the validation lists, if they are in another")
    parser.add_argument("--train", help="file of the training lists, if they are in another")
    parser.add_argument("--dataset", help="the dataset of the lists, for popularity and titles")


def call(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print a table, and a sentence on what it means.

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
    parts = _parts(args, known.items)
    if not args.dataset:
        known = _of_texts(parts, known.items)
    lists = Lists(parts["test"].target, parts["test"].items)
    if len(lists) < 2:
        raise UserError(f"{args.file} has {len(lists)} list of the test; it must have two or more.")
    reference = _reference(parts, lists.items.shape[1])
    found = audit(lists, reference, known.popularity, known.title_length)
    print(_table(found, args.file, lists.items.shape[1]))


def _reference(parts: dict[str, CandidateLists], length: int) -> Lists | None:
    """The lists for validation and training, if there are such, of that many candidates."""
    alike = []
    for phase in ("valid", "train"):
        if len(part := parts[phase]):
            if part.items.shape[1] == length:
                alike.append(part)
            else:
                print(f"The {phase} lists are of another length, and are left out.")
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
        catalogue, lengths = Catalogue.without_titles(dataset), None
    items = KnownItems(dataset, catalogue)
    train_data, *_ = data_preparation(config, dataset)
    return Known(items, popularity(train_data._dataset), lengths)


def _parts(args: argparse.Namespace, items: Coder) -> dict[str, CandidateLists]:
    """The lists for test, validation and training."""
    file = read_lists(user_path(args.file), Numbers(), items, anonymous=True)
    parts = {phase: file.of(phase) for phase in ("test", "valid", "train")}
    for phase in ("valid", "train"):
        if other := getattr(args, phase):
            if len(parts[phase]):
                raise UserError(
                    f"--{phase}={other}: {args.file} has lists of the phase {phase} already; "
                    "leave it out."
                )
            parts[phase] = read_lists(user_path(other), Numbers(), items, anonymous=True)
    return parts


def _of_texts(parts: dict[str, CandidateLists], items: Coder) -> Known:
    """Popularity as the training part has it; titles where the texts are titles."""
    assert isinstance(items, Numbers)
    train, size = parts["train"], len(items.of)
    counts = np.bincount(train.target, minlength=size) if len(train) else None
    if counts is not None and train.met is not None:
        counts = np.zeros(size, np.int64)
        counts[: len(train.met)] = train.met
    titles = parts["test"].met is not None  # only files of titles have histories
    return Known(items, counts, np.array([len(text) for text in items.of]) if titles else None)


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
    for name, need in (("popularity", "--dataset or --train"), ("title length", "--dataset")):
        if name not in names:
            lines.append(f"The guesser by {name} is left out; it needs {need}.")
    warnings = [f"warning: {text}" for text in found.warnings(Path(file).name)]
    by = "popularity explains" if found.knows_popularity else "items' shares as targets explain"
    few = f"Fewer than {ENOUGH} lists are too few to tell; p and the intervals are rough."
    end = few if found.lists < ENOUGH else f"No guesser is above what {by}."
    return "\n".join([*lines, *(warnings or [end])])
