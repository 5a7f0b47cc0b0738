"""A run's folder: which it is, when it holds a run, and that one process alone writes it."""

from __future__ import annotations

import errno
import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import IO

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from recbole.config import Config
from recbole.utils import get_local_time

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import remove_parts, user_path
from recbole_sdpo.result import INPUTS_FILE, RANKS_FILE, RESULT_FILE
from recbole_sdpo.trainer.best_weights import SELECTION
from recbole_sdpo.trainer.state import STATE, STATE_FILE, holds_state
from recbole_sdpo.trainer.step_file import STEPS_FILE

LOG_FILE = "run.log"
"""The first file that a run writes, by which a folder is known as a run's."""

ORPHANS_S = 8.0
"""Seconds after which torch's worker processes have ended whose parent is gone: they look every
five."""

STAGES = ("sft", "sdpo")
"""Stages, and the folders of their checkpoints."""


def run_folder(config: Config) -> Path:
    """The folder of a run, for all its processes: the run's that it resumes, or a new one, as asked
    for or named by time.

    A folder holds a run once something is in it that would be lost: a state, a checkpoint or a
    result; a state is written before the first checkpoint. What a run leaves that was killed
    earlier is in nobody's way, and to resume it is to begin it again.

    Raises:
        UserError: there is nothing to resume, or the folder asked for holds a run.
    """
    if config["resume"]:
        folder = user_path(config["resume"])
        other = config["run_dir"] and user_path(config["run_dir"])
        if other and other.resolve() != folder.resolve():
            raise UserError(
                f"run_dir={str(other)!r} is another folder than resume={str(folder)!r}, where the "
                "run goes on; leave run_dir out."
            )
        _check_resumable(folder)
        return folder
    wanted = user_path(config["run_dir"]) if config["run_dir"] else None
    if wanted and (wanted / RESULT_FILE).exists():
        raise UserError(f"run_dir={str(wanted)!r} holds a run that has ended; give another folder.")
    if wanted and (holds_state(wanted) or _checkpoints(wanted)):
        raise UserError(
            f"run_dir={str(wanted)!r} holds a run already; give another folder, or "
            f"resume={str(wanted)!r}."
        )
    if wanted and wanted.is_dir() and not (wanted / LOG_FILE).is_file():
        _check_free(wanted)
    state, chosen = PartialState(), [""]
    if state.is_main_process:
        name = f"{config['model']}-{config['dataset']}-{get_local_time()}"
        tries = (
            [wanted]
            if wanted
            else (
                user_path(config["checkpoint_dir"]) / (name + suffix)
                for suffix in ("", *map("-{}".format, range(2, 1000)))
            )
        )
        for folder in tries:
            try:
                # another run may have begun in the same second
                folder.mkdir(parents=True, exist_ok=folder == wanted)
                chosen = [str(folder)]
                break
            except OSError as error:
                if folder == wanted or not isinstance(error, FileExistsError):
                    raise UserError(
                        f"the run's folder {str(folder)!r} cannot be made: {error.strerror}; give "
                        "another run_dir."
                    ) from error
    return Path(broadcast_object_list(chosen)[0] if state.num_processes > 1 else chosen[0])


def _check_free(folder: Path) -> None:
    """Is nothing in ``folder``, which is no run's, that a run would write over or remove?"""
    parts = [f"{stage}.{end}" for stage in STAGES for end in ("part", "old")]
    weights = [path.name for path in folder.glob("*.pth")]  # as a baseline leaves them
    for name in (STATE, SELECTION, RANKS_FILE, STEPS_FILE, INPUTS_FILE, *parts, *weights):
        if (folder / name).exists():
            raise UserError(
                f"run_dir={str(folder)!r} holds {name}, which no run has put there, and a run "
                "would write over it; give another folder."
            )


def _check_resumable(folder: Path) -> None:
    given = f"resume={str(folder)!r}"
    if (folder / RESULT_FILE).is_file():
        raise UserError(
            f"{given}: that run has ended, and its result is in {folder / RESULT_FILE}; leave out "
            "resume to run it again."
        )
    if holds_state(folder):
        return
    if checkpoints := _checkpoints(folder):
        hint = f"to begin at its checkpoint, give sft_checkpoint={str(checkpoints[0])!r}"
        raise UserError(f"{given} holds no {STATE}/{STATE_FILE} to go on from; {hint}.")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / LOG_FILE).is_file()):
        raise UserError(
            f"{given} holds no {STATE}/{STATE_FILE}; give the folder of a run that was interrupted."
        )


def _checkpoints(folder: Path) -> list[Path]:
    return [folder / stage for stage in STAGES if (folder / stage).exists()]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder`` while this process lives, and remove what runs that died
    were writing there.

    Raises:
        UserError: a run is at work in it.
    """
    with (folder / LOG_FILE).open("a") as log:
        try:
            _lock(log, folder)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            getLogger().warning(
                f"{folder} is on a file system without locks: nothing keeps another run out of it."
            )
        if (folder / RESULT_FILE).exists():
            raise UserError(
                f"{str(folder)!r} holds a run that has ended meanwhile; give another folder."
            )
        remove_parts(folder, STAGES)
        yield


def _lock(log: IO, folder: Path) -> None:
    """Processes that prepare batches hold the lock of a run that was killed until they see that
    it is gone, some seconds later."""
    until = time.monotonic() + ORPHANS_S
    while True:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"Another run is at work in {str(folder)!r}; wait until it has ended, or give "
                    "another folder."
                ) from error
            time.sleep(0.1)


def tidy(folder: Path) -> None:
    """Remove what only an interrupted run has a use for."""
    for part in (STATE, SELECTION):
        shutil.rmtree(folder / part, ignore_errors=True)
    remove_parts(folder, STAGES)
