"""A run's curves as a file: one row for each optimizer step."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

FILE = "steps.csv"

DIAGNOSTICS = ("reward_positive", "reward_negative", "margin", "accuracy", "logp_positive", "hardest_negative_weight")
COLUMNS = ("stage", "step", "targets", "loss", "gradient_norm", "learning_rate", *DIAGNOSTICS)


class StepFile:
    """Appends to ``steps.csv`` in ``run_dir``; what a stage does not have stays empty.

    Args:
        step: of ``stage``, from which it writes; rows that an interrupted run wrote from there on are dropped.
    """

    def __init__(self, run_dir: Path, stage: str, step: int) -> None:
        self._stage, file = stage, run_dir / FILE
        old = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=COLUMNS)
        old[(old["stage"] != stage) | (old["step"] < step)].to_csv(file, index=False)
        self._file = file.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, targets: int, values: dict[str, float]) -> None:
        """A row; ``targets`` are those trained on so far."""
        row = {"stage": self._stage, "step": step, "targets": targets, **values}
        self._file.write(",".join(str(row.get(column, "")) for column in COLUMNS) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
