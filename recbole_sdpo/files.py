"""Files and folders that are there whole or not at all, whenever a process or the power dies, and how to tell that they still are."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recbole_sdpo.errors import UserError

SUMS = "SHA256SUMS"
"""The digests of a folder's files, as ``sha256sum --check`` reads them."""

PART, OLD = ".part", ".old"
"""Names of what is being written, and of what it is about to replace, end so; a run that begins or goes on removes them."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to, which takes the place of ``path`` at the end, or is gone if that fails.

    Raises:
        OSError: the disk is full, the folder is read-only, …
    """
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        yield part
        _flush(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` to write into, which takes its place at the end.

    A folder cannot be renamed over another one: the old one steps aside first. A process that dies in between leaves it there, and
    :func:`settle` puts it back.

    Raises:
        OSError: the disk is full, the folder is read-only, …
    """
    part, old = (folder.with_name(folder.name + end) for end in (PART, OLD))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for file in [*part.rglob("*"), part]:
            _flush(file)
        settle(folder)
        if folder.exists():
            os.rename(folder, old)
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        settle(folder)
        raise
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(folder: Path) -> None:
    """Undo what a process left that died while :func:`whole_folder` replaced ``folder``."""
    old = folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """The digest of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write the digests of the files in ``folder`` into it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SUMS)
    lines = [f"{sha256(file)}  {file.relative_to(folder)}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_seal(folder: Path) -> None:
    """Are the files in ``folder`` those that :func:`seal` saw?

    Raises:
        UserError: naming the file that is not, or is not there.
    """
    sums = folder / SUMS
    if not sums.is_file():
        raise UserError(f"{sums} is missing: the folder is not whole, or not one that a run wrote; give another one.")
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file() or sha256(file) != digest:
            state = "damaged" if file.is_file() else "missing"
            raise UserError(f"{file} is {state}: it is not what the run wrote ({SUMS} beside it); give another checkpoint.")


def _flush(path: Path) -> None:
    """Have the disk hold what ``path``, a file or a folder, has been given."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
