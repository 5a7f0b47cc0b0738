"""The state of a run in two files, safetensors and JSON, so that a run that dies goes on where it was.

All draws follow from the seed and the step's number, so that a resumed run ends as the uninterrupted one does.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from recbole_sdpo.errors import UserError
from recbole_sdpo.trainer.stage import Stage

FOLDER = "state"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_state(run_dir: Path, stage: Stage, rest: dict[str, Any]) -> None:
    """Write the weights, the optimizer's moments, the stage's progress and ``rest`` (JSON); whole or not at all."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in stage.model.lm.trainable().items():
        tensors[f"weight/{name}"] = weight.detach().contiguous()
        for moment, value in stage.optimizer.state.get(weight, {}).items():
            tensors[f"{moment}/{name}"] = value.contiguous()
    file = f"{stage.name}-{stage.step}-{time.time_ns()}.safetensors"  # never the one that state.json now points to
    save_file(tensors, folder / file)
    state = {"tensors": file, "stage": stage.name, "progress": stage.progress(), **rest}
    (folder / "next.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    os.replace(folder / "next.json", folder / "state.json")
    for old in folder.glob("*.safetensors"):
        if old.name != file:
            old.unlink()


def read_state(run_dir: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote as JSON.

    Raises:
        UserError: there is nothing to resume in ``run_dir``.
    """
    file = run_dir / FOLDER / "state.json"
    if not file.is_file():
        raise UserError(f"resume={str(run_dir)!r} holds no {FOLDER}/state.json; give the folder of a run that was interrupted.")
    return json.loads(file.read_text(encoding="utf-8"))


@torch.no_grad()
def load_state(run_dir: Path, stage: Stage) -> None:
    """Put ``stage`` where it was: weights, moments, schedule and progress."""
    state = read_state(run_dir)
    tensors = load_file(run_dir / FOLDER / state["tensors"], device=str(stage.model.lm.device))
    for name, weight in stage.model.lm.trainable().items():
        weight.copy_(tensors[f"weight/{name}"])
        moments = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS if f"{moment}/{name}" in tensors}
        if moments:
            stage.optimizer.state[weight] = moments
    stage.continue_from(state["progress"])
