"""A run's curves as a file: one row for each optimizer step."""

from __future__ import annotations

import hashlib
import os
from logging import getLogger
from pathlib import Path
from typing import TypedDict

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import naming, whole_file
from recbole_sdpo.objectives import Diagnostics

STEPS_FILE = "steps.csv"

KL = "kl"
"""The column of the KL divergence from the reference."""

COLUMNS = (
    *("stage", "step", "targets", "loss", "gradient_norm", "learning_rate"),
    *Diagnostics._fields,
    KL,
)
HEAD = ",".join(COLUMNS).encode() + b"\n"


class Mark(TypedDict):
    """A beginning of the file: its length, and its sha256."""

    bytes: int
    sha256: str


class StepFile:
    """Appends to ``steps.csv`` in ``run_dir``; what a stage does not have stays empty.

    Args:
        mark: of the run that is resumed, as :meth:`mark` gave it: what it wrote until then stays,
            byte for byte, and what came after is dropped. None for a run that begins.

    Raises:
        UserError: the file is not as that run wrote it.
        OSError: the disk is full, …; it names the file.
    """

    def __init__(self, run_dir: Path, mark: Mark | None) -> None:
        self._path = run_dir / STEPS_FILE
        content = HEAD if mark is None else self._rows_until(mark)
        with whole_file(self._path) as part:
            part.write_bytes(content)
        self._digest, self._size = hashlib.sha256(content), len(content)
        # of a run that an older version began, there are fewer
        self._columns = content.split(b"\n", 1)[0].decode().split(",")
        self._file = self._path.open("ab", buffering=0)

    def _rows_until(self, mark: Mark) -> bytes:
        if not self._path.is_file():
            getLogger().warning(
                f"{self._path} is not there; the run goes on without the rows of before."
            )
            return HEAD
        rows = self._path.read_bytes()[: mark["bytes"]]
        if hashlib.sha256(rows).hexdigest() != mark["sha256"]:
            raise UserError(
                f"{self._path} is damaged: it is not what the run wrote; put it back, or delete it "
                "to go on without the rows of before."
            )
        return rows

    def write(self, stage: str, step: int, targets: int, values: dict[str, float]) -> None:
        """A row; ``targets`` are those trained on so far in the stage."""
        row = {"stage": stage, "step": step, "targets": targets, **values}
        line = ",".join(str(row.get(column, "")) for column in self._columns).encode() + b"\n"
        with naming(self._path):
            self._file.write(line)
        self._digest.update(line)
        self._size += len(line)

    def mark(self) -> Mark:
        """How far the file is, once the disk has all of it."""
        with naming(self._path):
            os.fsync(self._file.fileno())
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        self._file.close()
