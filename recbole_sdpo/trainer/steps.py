"""A run's curves as a file: one row for each optimizer step."""

from __future__ import annotations

import os
from logging import getLogger
from pathlib import Path

from recbole_sdpo.files import naming, whole_file

FILE = "steps.csv"

DIAGNOSTICS = ("reward_positive", "reward_negative", "margin", "accuracy", "logp_positive", "hardest_negative_weight")
COLUMNS = ("stage", "step", "targets", "loss", "gradient_norm", "learning_rate", *DIAGNOSTICS)


class StepFile:
    """Appends to ``steps.csv`` in ``run_dir``; what a stage does not have stays empty.

    Args:
        step: of ``stage``, from which it writes; rows that an interrupted run wrote from there on are dropped, and those before stay as
            they are, byte for byte.

    Raises:
        OSError: the disk is full, …; it names the file.
    """

    def __init__(self, run_dir: Path, stage: str, step: int) -> None:
        self._stage, self._path = stage, run_dir / FILE
        rows = self._path.read_bytes().splitlines(keepends=True)[1:] if self._path.is_file() else []
        before = [_place(row) for row in rows]
        end = next((number for number, (name, at) in enumerate(before) if at < 0 or (name == stage and at >= step)), len(rows))
        if [at for name, at in before[:end] if name == stage] != list(range(step)):
            getLogger().warning(f"{self._path} has lost rows of {stage} before step {step}; the run goes on without them.")
        with whole_file(self._path) as part:
            part.write_bytes(b"".join([",".join(COLUMNS).encode() + b"\n", *rows[:end]]))
        self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, targets: int, values: dict[str, float]) -> None:
        """A row; ``targets`` are those trained on so far."""
        row = {"stage": self._stage, "step": step, "targets": targets, **values}
        with naming(self._path):
            self._file.write(",".join(str(row.get(column, "")) for column in COLUMNS) + "\n")

    def flush(self) -> None:
        """Have the disk hold what was written."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.flush()
        self._file.close()


def _place(row: bytes) -> tuple[str, int]:
    """The stage and the step of a row, or a step of -1 if it was cut short."""
    stage, step, *_ = [*row.decode(errors="replace").split(","), "", ""]
    return (stage, int(step)) if row.endswith(b"\n") and step.isdecimal() else (stage, -1)
