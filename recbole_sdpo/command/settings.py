"""``recbole-sdpo settings``: what can be set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from recbole_sdpo.output import show
from recbole_sdpo.settings import table

HELP = "print our settings with their defaults"

EXAMPLES = """\
  recbole-sdpo settings
  recbole-sdpo settings negatives           those with that word in their name or explanation"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which of them."""
    parser.add_argument("word", nargs="?", default="", help="print those with this word alone")


def call(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the table.

    Raises:
        UserError: no setting has the word.
    """
    show(table(args.word))
