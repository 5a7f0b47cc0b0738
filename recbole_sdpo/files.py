"""Files and folders that are there whole or not at all, whenever a process or the power dies,
and how to tell that they still are."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from recbole_sdpo.errors import UserError

SUMS = "SHA256SUMS"
"""The digests of a folder's files, as ``sha256sum --check`` reads them."""

PART, OLD = ".part", ".old"
"""Names of what is being written, and of what it is about to replace, end so; a run that begins
or goes on removes them."""


def user_path(text: str | Path) -> Path:
    """``text`` as a path, with ``~`` for the user's home; one of a user whom this machine does
    not know stays as it is."""
    return Path(os.path.expanduser(text))


def config_file(name: str | Path) -> Path:
    """``name`` as a path; where no such file is, and it begins with ``configs/``, the one that
    comes with this package."""
    path = user_path(name)
    brought = Path(__file__).parent / path
    return (
        brought
        if path.parts[:1] == ("configs",) and not os.path.lexists(path) and brought.exists()
        else path
    )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to, which takes the place of ``path`` at the end, or
    is gone if that fails.

    Whatever writes it, its permissions are those that the umask leaves.

    Raises:
        OSError: the disk is full, the folder is read-only, …; it names the file.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    with naming(path):
        try:
            part.touch()
            mode = part.stat().st_mode
            yield part
            part.chmod(mode)
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


def write_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write ``record`` as JSON, whole or not at all, with its own digest as ``sha256``; returns
    what the file holds."""
    record = json.loads(json.dumps(record))  # as it will be read
    record["sha256"] = _digest(record)
    write_text(path, json.dumps(record, indent=2))
    return record


def read_record(path: Path) -> dict[str, Any] | None:
    """What :func:`write_record` wrote, or None if the file is not as it was written."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = record["sha256"] == _digest(
            {key: value for key, value in record.items() if key != "sha256"}
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file, whoever wrote it.

    Raises:
        UserError: it is not there, or holds something else; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the folder must be one that a run wrote.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); it must be JSON, as a run wrote it."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}; it must be a dictionary, as a run wrote it."
        )
    return content


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` at the end, or is gone if that fails;
    permissions as the umask leaves them. Nothing may be there, and nothing beside it is touched.

    Raises:
        OSError: the disk is full, the folder is read-only, …; it names the folder.
    """
    with naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(PART, f".{folder.name}.", folder.parent) as place:
            part = Path(place, folder.name)
            part.mkdir()
            mode = part.stat().st_mode & 0o777
            yield part
            _finish(part, mode)
            os.rename(part, folder)
        _flush(folder.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` to write into, which takes its place at the end; permissions
    as the umask leaves them. Where ``folder`` lies, the names ``<folder>.part`` and
    ``<folder>.old`` are ours.

    A folder cannot be renamed over another one: the old one steps aside first. A process that dies
    in between leaves it there, and :func:`settle` puts it back.

    Raises:
        OSError: the disk is full, the folder is read-only, …; it names the folder.
    """
    part, old = (folder.with_name(folder.name + end) for end in (PART, OLD))
    with naming(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        mode = part.stat().st_mode & 0o777
        try:
            yield part
            _finish(part, mode)
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


def remove_parts(folder: Path, folders: Iterable[str]) -> None:
    """Remove from ``folder`` what processes that died were writing there: files of
    :func:`whole_file`, and those of ``folders`` in it, which are of :func:`whole_folder`. What they
    were replacing goes back to its place; whatever else is there stays."""
    for name in folders:
        settle(folder / name)
        shutil.rmtree(folder / f"{name}{PART}", ignore_errors=True)
    for part in folder.glob(f"*{PART}"):
        if part.is_file() and re.fullmatch(rf".+\.\d+{re.escape(PART)}", part.name):
            part.unlink(missing_ok=True)


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


def sealed(folder: Path) -> dict[str, str]:
    """The digests that :func:`seal` wrote, by the files' names; none where it has not."""
    sums = folder / SUMS
    if not sums.is_file():
        return {}
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def check_seal(folder: Path) -> None:
    """Are the files in ``folder`` those that :func:`seal` saw?

    Raises:
        UserError: naming the file that is not, or is not there.
    """
    sums = folder / SUMS
    if not sums.is_file():
        raise UserError(
            f"{sums} is missing: the folder is not whole, or not one that a run wrote; give "
            "another one."
        )
    digests = {folder / name: digest for name, digest in sealed(folder).items()}
    for file in sorted(
        {*digests, *(file for file in folder.rglob("*") if file.is_file() and file != sums)}
    ):
        if not file.is_file() or sha256(file) != digests.get(file):
            state = (
                "not listed" if file not in digests else "damaged" if file.is_file() else "missing"
            )
            raise UserError(
                f"{file} is {state}: it is not what the run wrote ({SUMS} beside it); give "
                "another checkpoint."
            )


def _finish(folder: Path, mode: int) -> None:
    """Give what ``folder`` holds the permissions of a folder of ``mode``, and have the disk hold
    it."""
    for file in [*folder.rglob("*"), folder]:
        file.chmod(mode if file.is_dir() else mode & 0o666)
        _flush(file)


def _flush(path: Path) -> None:
    """Have the disk hold what ``path``, a file or a folder, has been given."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the operating system name ``path``; those of safetensors and tokenizers, which
    have no class in common, become such."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # as Rust says it
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
