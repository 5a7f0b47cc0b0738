"""Programs that begin at once: each is forked from this process, where everything is imported.

Importing torch, transformers and RecBole takes five seconds, a toy run about one. A child has its
own folder, home, arguments, output and limits, and never returns into the code of its parent.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SECONDS = 60
"""A program that runs for longer hangs."""

MEMORY = 4 << 30
"""Bytes of address space that a program may take beyond those of this process."""

SENT = (signal.SIGINT, signal.SIGTERM)
"""The signals that a program may be sent."""

TYPED = b"y\n" * 50
"""What stands on standard input, for who reads there what nobody has asked for."""


@dataclass(frozen=True)
class Ending:
    """How a program ended.

    Attributes:
        code: its exit code; below 0, the signal that killed it; None, it hung.
        out, err: what it wrote.
        asked: it read its standard input.
    """

    code: int | None
    out: str
    err: str
    asked: bool


class Program:
    """A child that runs ``call`` in ``folder``, from now on.

    Args:
        folder: its working directory, in which its home and temporary files are, too.
        call: what it runs; its end is that of the program, as Python would end it.
        arguments: of the command line.
        first: what the child calls before.
        streams: the folder of what it writes and reads there; in ``folder`` by default.
    """

    def __init__(
        self,
        folder: Path,
        call: Callable[[], object],
        arguments: Sequence[str] = (),
        first: Callable[[], object] = lambda: None,
        streams: Path | None = None,
    ) -> None:
        place = streams or folder / "streams"
        for part in (folder / "home", folder / "tmp", place):
            part.mkdir(parents=True, exist_ok=True)
        number = len(list(place.glob("*.err")))
        self._out, self._err = (place / f"{number}.{end}" for end in ("out", "err"))
        (place / "in").write_bytes(TYPED)
        self._in = os.open(
            place / "in", os.O_RDONLY
        )  # shared with the child, and so is the place up to which it read
        handles = [
            self._in,
            *(
                os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for file in (self._out, self._err)
            ),
        ]
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, SENT)  # until the child knows how to end
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                _settle_in(folder, handles)
                sys.argv = ["recbole-sdpo", *arguments]
                first()
                code = _run(call)
            finally:
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT)
        for handle in handles[1:]:
            os.close(handle)
        self._handle, self._code = os.pidfd_open(self.pid), None

    def ended(self, seconds: float) -> bool:
        """Has it ended ``seconds`` from now, at the latest?"""
        return bool(select.select([self._handle], [], [], max(0, seconds))[0])

    def code(self) -> int:
        """The exit code of a program that has ended; below 0, the signal that killed it."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def send(self, number: int) -> None:
        """Send it a signal; Ctrl-C reaches what it has begun, too."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGINT:
                os.killpg(self.pid, number)
            else:
                signal.pidfd_send_signal(self._handle, number)

    def ending(self, seconds: float = SECONDS, alone: bool = True) -> Ending:
        """Wait for its end; what it has begun is killed then, if it is to be ``alone``."""
        hung = not self.ended(seconds)
        if hung:
            self.send(signal.SIGKILL)
        code = self.code()
        if alone:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        asked = os.lseek(self._in, 0, os.SEEK_CUR) > 0
        os.close(self._in)
        os.close(self._handle)
        out, err = (
            file.read_text(encoding="utf-8", errors="replace") for file in (self._out, self._err)
        )
        return Ending(None if hung else code, out, err, asked)


def warm_up(folder: Path, call: Callable[[], object]) -> None:
    """Import what a program that runs ``call`` imports as it goes."""
    names = folder / "modules.txt"

    def note() -> None:
        call()
        names.write_text("\n".join(sys.modules), encoding="utf-8")

    ending = Program(folder, note).ending(10 * SECONDS)
    if ending.code:
        raise RuntimeError(f"The program to warm up with failed: {ending.err}")
    for name in names.read_text(encoding="utf-8").split("\n"):
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(ImportError):  # a module that was made, not imported
                importlib.import_module(name)


def _settle_in(folder: Path, streams: list[int]) -> None:
    # After a fork torch makes its pool of threads anew at the first call, without a lock: two
    # threads at once fail with "Invalid thread pool!" (pytorch/pytorch#55341).
    torch.set_num_threads(torch.get_num_threads())
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # Python's own streams may be those of a test runner.
    sys.stdin = io.TextIOWrapper(io.FileIO(0))
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w"), encoding="utf-8", line_buffering=True)
        for number in (1, 2)
    )
    os.chdir(folder)
    os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "COLUMNS": "200"}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(call: Callable[[], object]) -> int:
    """Run ``call`` and end as Python does; returns the exit code."""
    code: object = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT)
        call()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)
