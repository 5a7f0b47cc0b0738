"""Rows of a JSON file, one at a time: those of a list, or one after another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from pandas.io.common import get_handle

from recbole_sdpo.data.csv_columns import UNREADABLE
from recbole_sdpo.errors import UserError, reason

BLOCK = 2**20
"""Letters that are read at a time."""

LARGEST_ROW = 16 * BLOCK
"""A row that is longer is a fault of the file."""

SPACE = re.compile(r"[\s\ufeff]*")


@contextmanager
def opened(path: Path, encoding: str | None = None) -> Iterator[TextIO]:
    """A file's text, unpacked by its name, in UTF-8 unless its first bytes or ``encoding`` say
    otherwise.

    Raises:
        UserError: it cannot be read, also later.
    """
    try:
        with get_handle(path, "rb", is_text=False, compression="infer") as file:
            stream = BufferedReader(file.handle)  # type: ignore[arg-type]
            marked = stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
            coded = encoding or ("utf-16" if marked else "utf-8-sig")
            yield TextIOWrapper(stream, coded, newline="")
    except UserError:
        raise
    except UNREADABLE as error:
        why = error.reason if isinstance(error, UnicodeDecodeError) else reason(error)
        raise UserError(
            f"{path} cannot be read: {why}; it must be text in {encoding or 'UTF-8'}."
        ) from error


def json_rows(path: Path, encoding: str | None = None) -> Iterator[Any]:
    """The rows of a file, whatever they are: what is in memory is one of them, and a block.

        a list             [{…}, {…}]
        JSON lines         {…}
                           {…}

    Raises:
        UserError: the file cannot be read, or is no JSON; an empty one has no row.
    """
    row = 0
    with opened(path, encoding) as stream:
        try:
            for value in _values(_Window(stream)):
                row += 1
                yield value
        except _NotJSON as error:
            raise UserError(
                f"{path}, row {row + 1} is not JSON ({error}); the file must be a list of rows, or "
                "have a row on each line."
            ) from error


class _NotJSON(Exception):
    """In a few words, what is wrong."""


class _Window:
    """The part of a stream that is in memory."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text, self._place = stream, "", 0

    def _more(self) -> bool:
        block = self._stream.read(BLOCK)
        self._text, self._place = self._text[self._place :] + block, 0
        return bool(block)

    def letter(self, skip: int = 0) -> str:
        """The next letter that is no white space, after ``skip`` others; empty at the end."""
        self._place += skip
        while True:
            space = SPACE.match(self._text, self._place)
            self._place = space.end() if space else self._place
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def value(self) -> Any:
        """The JSON value that begins at that letter."""
        while True:
            try:
                value, self._place = DECODER.raw_decode(self._text, self._place)
                return value
            except (ValueError, RecursionError) as error:  # half of it may be in the next block
                if len(self._text) - self._place > LARGEST_ROW or not self._more():
                    raise _NotJSON(getattr(error, "msg", str(error))) from error


DECODER = json.JSONDecoder()


def _values(window: _Window) -> Iterator[Any]:
    if window.letter() != "[":
        while window.letter():
            yield window.value()
        return
    after = window.letter(skip=1)
    while after != "]":
        yield window.value()
        after = window.letter()
        if after not in ("]", ","):
            raise _NotJSON("no comma before it" if after else "the list does not end")
        if after == ",":
            window.letter(skip=1)
    if window.letter(skip=1):
        raise _NotJSON("the list has ended before it")
