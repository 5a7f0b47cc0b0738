"""What the machine and its disks must have for a run."""

from __future__ import annotations

import os

from recbole.config import Config
from recbole.utils import ModelType

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import user_path
from recbole_sdpo.settings import MODEL


def check_memory(config: Config, events: int) -> None:
    """RecBole writes the sequence before each event out, one number of 64 bits for each of its
    items and columns.

    Args:
        events: of the data.

    Raises:
        UserError: the machine has not the memory for one column of them.
    """
    length = config["MAX_ITEM_LIST_LENGTH"]
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL and 8 * length * events > memory():
        raise UserError(
            f"MAX_ITEM_LIST_LENGTH={length} must be smaller: with {events:,} events, "
            f"{8 * length * events / 2**30:,.0f} GiB and more are "
            f"needed, and this machine has {memory() / 2**30:,.0f}."
        )


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_folders(config: Config) -> None:
    """Can the folders of a run be written, and are the checkpoint that it begins from and its
    candidates there?

    Raises:
        UserError: one is a file, or in a folder that is one or cannot be written; the message names
            both. Or the checkpoint is no folder, or the candidates are no file.
    """
    given = config["candidates_file"]
    if given and not user_path(given).is_file():
        raise UserError(f"candidates_file={given!r} must be a file that is there.")
    start = config["sft_checkpoint"] if config["model"] == MODEL else None
    if start and not user_path(start).is_dir():
        raise UserError(
            f"sft_checkpoint={start!r} must be a folder that is there: of a run, or 'sft' or "
            "'sdpo' in one."
        )
    key = next(key for key in ("resume", "run_dir", "checkpoint_dir") if config[key])
    path = os.path.abspath(os.path.expanduser(config[key]))
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{key}={config[key]!r} must be a folder, and is a file.")
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise UserError(f"{key}={config[key]!r} must be a folder, and {path!r} above it is a file.")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(
            f"{key}={config[key]!r} must be a folder that can be written, and {path!r} cannot."
        )
