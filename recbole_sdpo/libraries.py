"""The libraries that this package is built on, and how old they may be."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from types import TracebackType

OLDEST = {"numpy": "1.26", "torch": "2.6", "transformers": "5.0", "peft": "0.21", "accelerate": "1.15"}
"""As setup.cfg has them, for whom pip did not ask: a checkout that was not installed, or a library that was replaced since."""


class Unfit(ImportError):
    """What is installed cannot serve; the message is one sentence that says what to install."""


def check_libraries() -> None:
    """Look at what is installed, before anything of it is imported and stumbles.

    Raises:
        Unfit: a library is missing or too old. Where nobody catches it, Python prints the sentence without a traceback.
    """
    for name, oldest in OLDEST.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            refuse(f"recbole-sdpo needs {name} {oldest} or later, which is not installed: pip install '{name}>={oldest}'")
        if _numbers(version) < _numbers(oldest):
            refuse(f"recbole-sdpo needs {name} {oldest} or later, and {version} is installed: pip install '{name}>={oldest}'")


def refuse(sentence: str) -> None:
    """Raise :class:`Unfit`, which ends a program with the sentence alone."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if kind is Unfit:
            print(f"error: {error}", file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = hook
    raise Unfit(sentence)


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 11) of 2.11.0+cu130."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
