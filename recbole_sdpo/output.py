"""What a command answers, on standard output."""

from __future__ import annotations

import os
import sys


def say(text: str) -> bool:
    """Print, also where there is no character for a letter; is there still a reader? There is
    none after ``| head``."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def show(text: str) -> None:
    """:func:`say`, and end where nobody reads on."""
    if not say(text):
        sys.exit(1)
