"""How the command ends when it is told to, or when the machine lets it down: one sentence, and the
line that goes on.

Ctrl-C, SIGTERM, which schedulers send, and SIGHUP, which a closed terminal sends, end a run at
once. Where training has a step to finish first, its state is kept. A second Ctrl-C does not wait.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from recbole_sdpo.errors import UserError

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "give a folder that can be written to",
    errno.EACCES: "give a folder or file that you have access to",
    errno.EPERM: "give a folder or file that you have access to",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "give a path whose parents are folders",
    errno.EEXIST: "give another name",
    errno.EISDIR: "give a file, not a folder",
    errno.EIO: "see to the disk",
}
"""Errors of the operating system that a user can mend, and how."""

LAUNCHERS_REPEAT_S = 1.0
"""A launcher passes a terminal's Ctrl-C on to processes that have had it already; so soon, it is
not a second one."""

AFTER_THE_FIRST_S = 3.0
"""What one process of a launch finds wrong, most likely all do: after so many seconds the first has
said it, and the launcher has ended the others."""


class Stopped(KeyboardInterrupt):
    """The run was told to end, by the signal ``signum``."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


_asked, _asked_at, _waits, _process = 0, 0.0, False, 0


def asked_to_stop() -> int:
    """The signal that asked this process to end after the step that it is at, or 0."""
    return _asked


@contextmanager
def finishing_steps() -> Iterator[None]:
    """Here a signal waits for whoever calls :func:`asked_to_stop`; one that nobody has looked at
    takes effect at the end.

    Raises:
        Stopped: at the end, or at a second Ctrl-C.
    """
    global _waits
    _waits = True
    try:
        yield
    finally:
        _waits = False
    if _asked:
        raise Stopped(_asked)


@contextmanager
def endings() -> Iterator[None]:
    """For the command's main function: signals end it with a sentence and the exit code that shells
    expect, 128 and their number; so does, with exit code 1, what a user can mend, be it an error of
    the operating system."""
    try:
        with _handlers():
            yield
    except KeyboardInterrupt as error:
        signum = getattr(error, "signum", signal.SIGINT)
        if not hasattr(error, "__notes__"):
            add_note(error, "nothing was begun, so give the command again")
        _say(f"stopped by {signal.Signals(signum).name}" + _then("; ", error))
        sys.exit(128 + signum)
    except UserError as error:
        process = int(os.environ.get("RANK", 0))
        if process:
            time.sleep(AFTER_THE_FIRST_S)
        who = f"process {process}: " if process else ""
        sys.exit(f"error: {who}{error}{_then('; ', error) if hasattr(error, '__notes__') else ''}")
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        _say(
            f"error: cannot use {error.filename or 'a file'}: {error.strerror}; "
            f"{REMEDIES[error.errno]}{_then(', then ', error)}"
        )
        sys.exit(1)


def say_how_to_go_on(error: BaseException, folder: Path | None) -> None:
    """Add to ``error`` a note: how the run in ``folder`` goes on, or with None, that it is to
    begin again."""
    if folder is None:
        note = "begin the run again: there was no state to go on from"
    elif _process:
        note = f"go on with: {_command(folder)}"
    else:
        note = f"go on with resume={str(folder)!r}"
    add_note(error, note)


def add_note(error: BaseException, note: str) -> None:
    """Have the command say ``note`` at its end; as ``add_note``, which Python 3.10 has not."""
    error.__notes__ = [*getattr(error, "__notes__", ()), note]


def as_given() -> list[str]:
    """The words of the command by which this program was started."""
    program, start = sys.argv[0], _launcher()
    if Path(program).name == "__main__.py":
        start += ["-m", "recbole_sdpo"]
    elif program.endswith(".py"):
        start.append(program)
    else:
        start = [Path(program).name]
    return [*start, *sys.argv[1:]]


def _launcher() -> list[str]:
    """The words before the program; of several machines the line is for each of them."""
    everywhere = int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", everywhere))  # mpirun does not say
    if everywhere == 1:
        return ["python"]
    machines = everywhere // here
    first = os.environ.get("MASTER_ADDR", "localhost")
    together = [f"--nnodes={machines}", "--rdzv_backend=c10d", f"--rdzv_endpoint={first}:29500"]
    return ["torchrun", *(together if machines > 1 else []), f"--nproc_per_node={here}"]


def _command(folder: Path) -> str:
    """The command as it was given, and to resume ``folder``."""
    others = [word for word in as_given() if not word.startswith(("--resume=", "--run_dir="))]
    return shlex.join([*others, f"--resume={folder}"])


def _then(before: str, error: BaseException) -> str:
    notes = "".join(before + note for note in getattr(error, "__notes__", ()))
    return notes if "go on with: " in notes else f"{notes}."  # a command is copied as it stands


def _say(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)


@contextmanager
def _handlers() -> Iterator[None]:
    """Python gives signals to the main thread alone."""
    global _asked, _process
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked, _process = 0, os.getpid()
    heard = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]  # nohup
    before, hook = {signum: signal.signal(signum, _handle) for signum in heard}, sys.unraisablehook

    def again(lost: UnraisableHookArgs) -> None:
        """A finalizer was at work when the signal came, and Python has nobody to hand its
        exception to: it comes once more."""
        global _asked
        if isinstance(lost.exc_value, Stopped):
            _asked = 0
            threading.Timer(0.01, os.kill, (os.getpid(), lost.exc_value.signum)).start()
        else:
            hook(lost)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _asked, _process = 0, 0


def _handle(signum: int, frame: FrameType | None) -> None:
    global _asked, _asked_at
    # a process that prepares batches: it ends with its parent, or when the parent ends it
    if os.getpid() != _process:
        if signum == signal.SIGTERM:
            os._exit(128 + signum)
        return
    first, now = not _asked, time.monotonic()
    if not first and (signum != signal.SIGINT or now - _asked_at < LAUNCHERS_REPEAT_S):
        return
    _asked, _asked_at = signum, now
    if not (first and _waits):
        raise Stopped(signum)
    if os.environ.get("RANK", "0") == "0":
        os.write(
            2,
            b"\nThe state is saved after this step, then the run ends; Ctrl-C once more ends it "
            b"now.\n",
        )
