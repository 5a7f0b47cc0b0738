"""Digests of files and of what this package's sources say, and the versions of packages."""

from __future__ import annotations

import ast
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import yaml

import recbole_sdpo
from recbole_sdpo.errors import UserError, reason
from recbole_sdpo.files import sha256
from recbole_sdpo.libraries import installed

VERSIONS = (
    "recbole-sdpo",
    "recbole",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "numpy",
    "pandas",
)

# Parts of the package that only look at results, or decide what to run, or whose outcome is in the
# settings already.
ONLOOKERS = frozenset(
    {
        "configs",
        "experiment",
        "report",
        "command",
        "__main__.py",
        "digests.py",
        "inputs.py",
        "libraries.py",
        "output.py",
        "recommend.py",
        "recommend_all.py",
        "serving.py",
        "threads.py",
        "SDPO-LLM.yaml",
    }
)

# Parts that models of RecBole have nothing to do with.
OF_SDPO_LLM = frozenset(
    {
        "settings.py",
        "lm",
        "model",
        "sdpo_trainer.py",
        "stage.py",
        "batches.py",
        "checkpoint.py",
        "reference.py",
        "state.py",
        "step_file.py",
        "objectives.py",
        "prompts.py",
        "prompts",
        "examples.py",
        "ratings.py",
    }
)

GRANULARITY = 2.0
"""Seconds within which a file may change twice and bear one time (those of FAT, the coarsest)."""


def sources(without: frozenset[str] = frozenset()) -> str:
    """sha256 of what this package's sources say, but for some files and folders, as they are on the
    disk now.

    Comments, docstrings and layout do not count. What does is Python's syntax tree, so another
    Python may give another digest.
    """
    root = Path(recbole_sdpo.__path__[0])
    files = sorted(file for file in root.rglob("*") if file.suffix in {".py", ".yaml"})
    counted = [file for file in files if not without & set(file.relative_to(root).parts)]
    return hashed("\n".join(f"{file.relative_to(root)} {known(file, meaning)}" for file in counted))


def package_versions() -> dict[str, str | None]:
    """The versions on which a result depends; None for what is not installed."""
    return {name: installed(name) for name in VERSIONS}


def digest(file: Path) -> str:
    """sha256 of a file's bytes, which is counted once in a process while the file stays as it is.

    Raises:
        UserError: it cannot be read.
    """
    return known(file, sha256)


_digests: dict[tuple[Path, Callable], tuple[tuple[int, ...], str]] = {}


def known(file: Path, of: Callable[[Path], str]) -> str:
    """``of(file)``, again only if the file is not as it was then.

    A file that has just been written may be written again without bearing another time, so that of
    such a one nothing is kept.
    """
    try:
        stamp, now = _stamp(file), time.time()
        before, value = _digests.get((file.absolute(), of), (None, ""))
        if before == stamp:
            return value
        value = of(file)
        written = max(stamp[-2:]) / 1e9
        if written + GRANULARITY < now and _stamp(file) == stamp:
            _digests[file.absolute(), of] = stamp, value
        return value
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason(error)}.") from error


def _stamp(file: Path) -> tuple[int, ...]:
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def meaning(file: Path) -> str:
    """The digest of a source without what has no effect."""
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".yaml":
            return hashed(repr(yaml.safe_load(text)))
        return hashed(ast.dump(_WithoutStrings().visit(ast.parse(text))))
    except (SyntaxError, yaml.YAMLError):  # somebody is writing it
        return hashed(text)


class _WithoutStrings(ast.NodeTransformer):
    """Docstrings, and whatever else is a string that nobody reads, go."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return (
            None
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            else node
        )


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
