"""What a command answers, on standard output."""

from __future__ import annotations

import os
import sys


def show(text: str) -> None:
    """Print, also where there is no character for a letter, and where nobody reads on (``|
    head``)."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
