"""The best titles of every user, in one file.

It is written in parts of so many users each, which lie beside it until all are there:

    best.csv.parts/what.json       of which policy, data and options they are
                   00000.csv       users 0 to 499
                   00001.csv       users 500 to 999, …

So memory is bounded, a call that was interrupted goes on, and several processes share the parts
without a word to each other: each takes every n-th, and the first waits for all and joins them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import read_record, remove_parts, whole_file, write_record
from recbole_sdpo.interrupt import add_note
from recbole_sdpo.recommend import Recommender, ids

USERS = 500
"""Users to a part: minutes of work for a large model on a CPU, seconds of it for a small one."""

RECORD = "what.json"

WAIT_S = 0.2
"""Seconds between two looks at what other processes have written."""


def check_output(file: Path) -> None:
    """Can a table be written to ``file``?

    Raises:
        UserError: its name has another ending, it exists, its folder does not, or a package is
            missing.
    """
    if file.suffix not in WRITERS:
        raise UserError(f"output={str(file)!r} must end in {' or '.join(WRITERS)}.")
    if file.suffix == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise UserError(
            f"output={str(file)!r} needs the package pyarrow; pip install "
            "'recbole-sdpo[parquet]', or give a name that ends in .csv."
        )
    if file.exists():
        raise UserError(f"output={str(file)!r} exists; remove it, or give another name.")
    if not file.parent.is_dir():
        raise UserError(f"output={str(file)!r}: its folder must exist.")


def recommend_all(
    recommender: Recommender,
    file: str | Path,
    users: Sequence[str],
    k: int = 10,
    exclude_history: bool = False,
    share: tuple[int, int] = (0, 1),
    show_progress: bool = False,
) -> None:
    """Write the ``k`` best titles of each of ``users`` to ``file``: the rows of
    :meth:`Recommender.recommend_to_users`, in the order of ``users``.

    Args:
        file: ``.csv``, or ``.parquet``, which needs the package pyarrow.
        share: which of how many processes this is, from 0; each has the same arguments.

    Raises:
        UserError: the file cannot be written, a user is unknown, ``k`` is out of range for one, or
            what lies beside the file is of another policy, other data or other options.
    """
    file, users = Path(file), ids(users)
    process, processes = share
    folder = file.with_name(f"{file.name}.parts")
    parts = [
        (folder / f"{number:05}{file.suffix}", users[first : first + USERS])
        for number, first in enumerate(range(0, len(users), USERS))
    ]
    mine = parts[process::processes]
    # The first joins the parts and removes them as soon as all are there. It waits for one that
    # this process has to write, and else may be at it, or through.
    waited_for = not all(part.exists() for part, _ in mine)
    if process and (not waited_for or file.exists()):
        return
    check_output(file)
    if not users:
        raise UserError("There are no users to recommend to.")
    met = [recommender.met(user) for user in users]
    recommender.check_k(k, dict(zip(users, met, strict=True)) if exclude_history else {})
    identity = _identity(recommender, users, met, k, exclude_history)
    try:
        _make_folder(folder, file)
        _check_record(folder, identity, file)
        with tqdm(
            total=sum(len(those) for _, those in mine),
            ncols=110,
            unit="user",
            disable=not show_progress,
            desc="recommending",
        ) as bar:
            for part, those in mine:
                if not part.exists():
                    best = recommender.recommend_to_users(those, k, exclude_history)
                    with whole_file(part) as new:
                        WRITERS[file.suffix]([best], new)
                bar.update(len(those))
        if process == 0:
            check_output(file)  # which another call may have written meanwhile
            _join([part for part, _ in parts], file)
            _remove([part for part, _ in parts], folder)
    except (OSError, KeyboardInterrupt) as error:
        if isinstance(error, FileNotFoundError) and not folder.is_dir():
            raise _gone(folder, file) from error
        add_note(error, f"the same command goes on from what is in {folder}")
        raise


def _join(parts: Sequence[Path], file: Path) -> None:
    """Put the parts together, once the other processes have written theirs."""
    read = pd.read_parquet if file.suffix == ".parquet" else _read_csv

    def tables() -> Iterator[pd.DataFrame]:
        for part in parts:
            while not part.exists():
                if not part.parent.is_dir():
                    raise _gone(part.parent, file)
                time.sleep(WAIT_S)
            yield read(part)

    with whole_file(file) as new:
        WRITERS[file.suffix](tables(), new)


def _read_csv(file: Path) -> pd.DataFrame:
    """As it was written: text stays text, whatever it looks like, and so do numbers."""
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def _write_csv(tables: Iterable[pd.DataFrame], file: Path) -> None:
    for number, table in enumerate(tables):
        table.to_csv(file, mode="a", index=False, header=number == 0)


def _write_parquet(tables: Iterable[pd.DataFrame], file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    writer = None
    for table in tables:
        rows = pyarrow.Table.from_pandas(table, preserve_index=False)
        writer = writer or pyarrow.parquet.ParquetWriter(file, rows.schema)
        writer.write_table(rows)
    if writer:
        writer.close()


WRITERS: dict[str, Callable[[Iterable[pd.DataFrame], Path], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
"""By the ending of a file's name: write some tables into it, one after another."""


def _identity(
    recommender: Recommender,
    users: Sequence[str],
    met: Sequence[np.ndarray],
    k: int,
    exclude_history: bool,
) -> dict[str, Any]:
    """What recommendations depend on: digests of the policy and of the data, and the options."""
    policy, data = hashlib.sha256(), hashlib.sha256()
    recommender.lm.add_to(policy)
    texts = [list(map(str, users)), list(recommender.catalogue.titles), recommender.window]
    data.update(json.dumps([*texts, list(map(str, recommender.item_tokens))]).encode())
    for items in met:
        data.update(np.int64(len(items)).tobytes() + items.astype(np.int64).tobytes())
    return {
        "policy": policy.hexdigest(),
        "data": data.hexdigest(),
        "k": int(k),
        "exclude_history": bool(exclude_history),
        "users_to_a_part": USERS,
    }


def _gone(folder: Path, file: Path) -> UserError:
    return UserError(
        f"{folder} is gone: another call has written {file}, or somebody removed it; give another "
        "name as output."
    )


def _make_folder(folder: Path, file: Path) -> None:
    """Make ``folder``, or see that it is one of ours.

    Raises:
        UserError: it is somebody else's.
    """
    try:
        folder.mkdir()
    except FileExistsError as error:
        inside = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
        # The record is the first file of ours, be it that another process is writing it.
        if inside and not any(name.startswith(RECORD) for name in inside):
            raise UserError(
                f"{folder} holds {min(inside)}, and no {RECORD}, as parts of {file.name} do; "
                "remove it, or give another name as output."
            ) from error


def _remove(parts: Iterable[Path], folder: Path) -> None:
    """Remove the parts and their record; whatever else lies in ``folder`` stays there."""
    for part in (*parts, folder / RECORD):
        part.unlink(missing_ok=True)
    remove_parts(folder, ())  # what a call that was killed was writing
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def _check_record(folder: Path, identity: dict[str, Any], file: Path) -> None:
    """Are the parts in ``folder``, if there are some, of this ``identity``? Then it is there."""
    path = folder / RECORD
    if not path.exists():
        write_record(path, identity)  # by several processes: the same
    record = read_record(path) or {}
    other = [key for key, value in identity.items() if record.get(key) != value]
    if other:
        raise UserError(
            f"{folder} holds parts of another call for {file.name} (other {', '.join(other)}); "
            "remove it, or give another name as output."
        )
