"""What a user can mend: the only errors that are printed without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A setting, a file or a row is wrong.

    Its message is one sentence that names the setting, file or row, its value, and what it must be.
    Everything else that is raised is a fault of ours, or of the machine, and shows its traceback.
    """


def meant(name: object, known: Iterable[object], otherwise: str = "") -> str:
    """How an error about an unknown name ends: the nearest known one, in whatever case, or else
    ``otherwise``, or all that are known."""
    folded = {str(each).lower(): str(each) for each in known}
    near = difflib.get_close_matches(str(name).lower(), folded, 1)
    if near:
        return f"did you mean {folded[near[0]]!r}?"
    return otherwise or f"it must be one of {', '.join(folded.values())}."


def reason(error: Exception) -> str:
    """Why a file cannot be read, in words, on one line."""
    words: dict[type[Exception], str] = {
        FileNotFoundError: "there is no such file",
        NotADirectoryError: "there is no such file",
        IsADirectoryError: "it is a folder",
        PermissionError: "its permissions do not allow it",
    }
    said = words.get(type(error)) or getattr(error, "strerror", None) or str(error)
    return " ".join(said.split())
