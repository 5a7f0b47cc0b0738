"""A run's process ends with the experiment that started it, however that ends."""

from __future__ import annotations

import os
import signal
import sys
import threading

LIFELINE = "RECBOLE_SDPO_LIFELINE"
"""Environment variable: the descriptor of a pipe whose other end the experiment holds."""


def end_with_parent() -> None:
    """Where an experiment started this process, send it SIGTERM as soon as the experiment is gone.

    The kernel closes the experiment's end of the pipe whatever it died of. Linux' own signal at a
    parent's death comes at the end of the parent's *thread* instead.
    """
    lifeline = os.environ.pop(LIFELINE, None)
    if lifeline is not None:
        threading.Thread(target=_watch, args=(int(lifeline),), name="lifeline", daemon=True).start()


def _watch(lifeline: int) -> None:
    os.read(lifeline, 1)  # nobody writes: it returns at the end of the other side
    print(
        "the experiment that started this run has ended, and so does this run",
        file=sys.stderr,
        flush=True,
    )
    os.kill(os.getpid(), signal.SIGTERM)
