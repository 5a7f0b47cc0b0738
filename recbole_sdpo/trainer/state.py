"""The state of a run in two files, safetensors and JSON, so that a run that dies goes on where it was.

All draws follow from the seed and the step's number, so that a resumed run ends as the uninterrupted one does.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import read_record, sha256, whole_file, write_record
from recbole_sdpo.trainer.stage import Stage

FOLDER = "state"
STATE_FILE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_state(run_dir: Path, stage: Stage, rest: dict[str, Any]) -> None:
    """Write the weights, the optimizer's moments, the stage's progress and ``rest`` (JSON).

    Until all of it is on the disk, the state of before counts.

    Raises:
        OSError: the disk is full, …
    """
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in stage.model.lm.trainable().items():
        tensors[f"weight/{name}"] = weight.detach().contiguous()
        for moment, value in stage.optimizer.state.get(weight, {}).items():
            tensors[f"{moment}/{name}"] = value.contiguous()
    file = folder / f"{stage.name}-{stage.step}-{time.time_ns()}.safetensors"  # never the one that state.json now points to
    try:
        with whole_file(file) as part:
            save_file(tensors, part)
        state = {
            "tensors": file.name,
            "sha256_of_tensors": sha256(file),
            "steps": stage.step_file and stage.step_file.mark(),
            "stage": stage.name,
            "progress": stage.progress(),
            **rest,
        }
        write_record(folder / STATE_FILE, state)
    except OSError:
        file.unlink(missing_ok=True)  # a full disk has no room for it
        raise
    for old in folder.iterdir():  # what died while it was written, too
        if old not in (file, folder / STATE_FILE):
            old.unlink()


def holds_state(run_dir: Path) -> bool:
    """Is there a state in ``run_dir``, be it damaged?"""
    return (run_dir / FOLDER / STATE_FILE).is_file()


def read_state(run_dir: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote as JSON.

    Raises:
        UserError: it is damaged.
    """
    state = read_record(run_dir / FOLDER / STATE_FILE)
    if state is None:
        raise _damaged(run_dir / FOLDER / STATE_FILE)
    return state


@torch.no_grad()
def load_state(run_dir: Path, stage: Stage) -> None:
    """Put ``stage`` where it was: weights, moments, schedule and progress.

    Raises:
        UserError: the state is damaged.
    """
    state = read_state(run_dir)
    file = run_dir / FOLDER / state["tensors"]
    if not file.is_file() or sha256(file) != state["sha256_of_tensors"]:
        raise _damaged(file)
    tensors = load_file(file, device=str(stage.model.lm.device))
    for name, weight in stage.model.lm.trainable().items():
        weight.copy_(tensors[f"weight/{name}"])
        moments = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS if f"{moment}/{name}" in tensors}
        if moments:
            stage.optimizer.state[weight] = moments
    stage.continue_from(state["progress"])


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is missing or damaged: it is not what the run wrote, which cannot be resumed; begin it in another folder.")
