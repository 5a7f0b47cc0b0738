"""The libraries that this package is built on, and how old they may be."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from types import TracebackType

OLDEST = {
    "numpy": "1.26",
    "torch": "2.11",
    "transformers": "5.0",
    "peft": "0.21",
    "accelerate": "1.15",
}
"""As pyproject.toml has them, for whom pip did not ask: a checkout that was not installed, or a
library that was replaced since."""


RECBOLE = "1.2.1"
"""The one that :mod:`recbole_sdpo.compat` knows."""

IMPORTED = (
    "pandas",
    "scipy",
    "matplotlib",
    "PyYAML",
    "colorama",
    "colorlog",
    "psutil",
    "scikit-learn",
    "tensorboard",
    "texttable",
    "thop",
    "tqdm",
)
"""What RecBole and we import beside, of any age. From Python 3.12 on RecBole is installed
without what it asks for."""


class Unfit(ImportError):
    """What is installed cannot serve; the message is one sentence that says what to install."""


def check_libraries() -> None:
    """Look at what is installed, before anything of it is imported and stumbles.

    Raises:
        Unfit: a library is missing or too old. Where nobody catches it, Python prints the sentence
            without a traceback.
    """
    if sys.version_info < (3, 10):  # noqa: UP036  a checkout runs without pip's word
        refuse(
            f"recbole-sdpo needs Python 3.10 or later, and this is {sys.version.split()[0]}: "
            "start it with another one"
        )
    versions = {name: installed(name) for name in ("recbole", *OLDEST, *IMPORTED)}
    if versions["recbole"] != RECBOLE:
        # With what it asks for, RecBole cannot be installed from Python 3.12 on: see
        # docs/versions.md.
        refuse(
            f"recbole-sdpo needs recbole {RECBOLE}, {_is(versions['recbole'])}: pip install "
            f"--no-deps recbole=={RECBOLE}"
        )
    for name, oldest in OLDEST.items():
        if _numbers(versions[name] or "0") < _numbers(oldest):
            refuse(
                f"recbole-sdpo needs {name} {oldest} or later, {_is(versions[name])}: pip install "
                f"'{name}>={oldest}'"
            )
    if missing := " ".join(name for name in IMPORTED if versions[name] is None):
        refuse(f"recbole-sdpo needs {missing}, {_is(None)}: pip install {missing}")


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is(version: str | None) -> str:
    return "which is not installed" if version is None else f"and {version} is installed"


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
