"""``recbole-sdpo import``: from two CSV files to a dataset of RecBole."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from recbole_sdpo.data.atomic import write_atomic
from recbole_sdpo.errors import UserError

HELP = "make a dataset of RecBole from a CSV file of events and one of items"

EXAMPLES = """\
  recbole-sdpo import --events=orders.csv --items=products.csv --name=shop
  recbole-sdpo import --events=e.csv --items=i.csv --name=shop \\
      --user=customer --item=sku --time=bought_at --title=product_name

It writes data/shop, and recbole-sdpo run --dataset=shop --data_path=data trains on it."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The files, and the names of their columns."""
    parser.add_argument("--events", required=True, help="CSV file with a row for each event")
    parser.add_argument("--items", required=True, help="CSV file with a row for each item")
    parser.add_argument("--name", required=True, help="of the dataset, such as shop")
    parser.add_argument(
        "--output",
        default="data",
        help="folder in which that of the dataset is made (default: data)",
    )
    parser.add_argument("--user", default="user_id", help="column of the events (default: user_id)")
    parser.add_argument(
        "--item",
        default="item_id",
        help="column of the events, and of the items unless --item_key (default: item_id)",
    )
    parser.add_argument(
        "--item_key",
        help="column of the items that holds the item, if its name differs from that in the events",
    )
    parser.add_argument(
        "--time",
        default="timestamp",
        help="column of the events: a number or a date (default: timestamp)",
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
    """Read two CSV files, write two atomic files, print one line.

    Raises:
        UserError: a file cannot be used.
    """
    own = {name: value for name, value in vars(args).items() if name != "command"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            print(write_atomic(titles=own.pop("title") or ["title"], **own))
        except OSError as error:  # a full disk, a folder that is read-only
            raise UserError(str(error)) from error
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
