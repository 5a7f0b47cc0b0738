"""``recbole-sdpo import``: from two CSV files, or from published lists, to a dataset of RecBole."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_sdpo.data.atomic import write_atomic
from recbole_sdpo.data.published import PHASES, write_published
from recbole_sdpo.errors import UserError
from recbole_sdpo.output import show

HELP = "make a dataset of RecBole from CSV files of events and items, or from published lists"

EXAMPLES = """\
  recbole-sdpo import --events=orders.csv --items=products.csv --name=shop
  recbole-sdpo import --events=e.csv --items=i.csv --name=shop \\
      --user=customer --item=sku --time=bought_at --title=product_name

It writes data/shop, and recbole-sdpo run --dataset=shop --data_path=data trains on it.

  recbole-sdpo import --name=lastfm \\
      --lists_train=train.json --lists_valid=val.json --lists_test=test.json

The rows of such a file have historyList, itemList and trueSelection. It writes data/lastfm, and
prints the command that trains on it."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The files, and the names of their columns."""
    parser.add_argument("--events", help="CSV file with a row for each event")
    parser.add_argument("--items", help="CSV file with a row for each item")
    parser.add_argument(
        "--lists_train",
        help="in place of both: JSON file of rows for training, with historyList, itemList and "
        "trueSelection",
    )
    parser.add_argument("--lists_valid", help="the same for validation")
    parser.add_argument("--lists_test", help="the same for the test")
    parser.add_argument("--name", required=True, help="of the dataset, such as shop")
    parser.add_argument(
        "--output",
        default="data",
        help="folder in which that of the dataset is made (default: data)",
    )
    parser.add_argument("--user", help="column of the events (default: user_id)")
    parser.add_argument(
        "--item",
        help="column of the events, and of the items unless --item_key (default: item_id)",
    )
    parser.add_argument(
        "--item_key",
        help="column of the items that holds the item, if its name differs from that in the events",
    )
    parser.add_argument(
        "--time", help="column of the events: a number or a date (default: timestamp)"
    )
    parser.add_argument(
        "--title",
        action="append",
        help="column of the items (default: title); give it again for further columns",
    )
    parser.add_argument(
        "--separator",
        help=r"between the columns of both files, such as ';' or \t (default: the one the header "
        r"shows)",
    )
    parser.add_argument(
        "--encoding", help="of both files, such as cp1252 or gb18030 (default: UTF-8)"
    )


def call(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Read the files, write a dataset, print what is in it.

    Raises:
        UserError: a file cannot be used, or options do not go together.
    """
    given = {key: value for key, value in vars(args).items() if value is not None}
    del given["command"]
    lists = {phase: given.pop(key) for phase in PHASES if (key := f"lists_{phase}") in given}
    _check_together(given, lists)
    if "title" in given:
        given["titles"] = given.pop("title")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            show(write_published(**lists, **given) if lists else write_atomic(**given))
        except OSError as error:  # a full disk, a folder that is read-only
            raise UserError(str(error)) from error
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)


def _check_together(given: Mapping[str, Any], lists: Mapping[str, str]) -> None:
    """Lists want three files and nothing of CSV; else there are two."""
    needed = [f"lists_{phase}" for phase in PHASES] if lists else ["events", "items"]
    there = {*given, *(f"lists_{phase}" for phase in lists)}
    for key in needed:
        if key not in there:
            others = " (or --lists_train, --lists_valid and --lists_test)" * (not lists)
            raise UserError(f"--{key} is missing; give {' and '.join(needed)}{others}.")
    for key in sorted(there - {*needed, "name", "output", "encoding"}) if lists else ():
        raise UserError(f"--{key} is for CSV files; leave it out with --lists_train.")
