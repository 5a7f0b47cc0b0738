"""Options of a command line, each of which is given once."""

from __future__ import annotations

import argparse
from typing import Any

from recbole_sdpo.errors import UserError


class Once(argparse.Action):
    """Stores a value. Of an option that is given twice, under whichever of its names, argparse
    takes the last without a word."""

    _given = False

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store it.

        Raises:
            UserError: it is there already.
        """
        if self._given and option:
            raise UserError(f"{option} is given twice; give it once.")
        self._given = True
        setattr(namespace, self.dest, values)


def once(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """``parser``, whose options that are added from now on are given once, unless they collect."""
    for name in (None, "store"):
        parser.register("action", name, Once)
    return parser
