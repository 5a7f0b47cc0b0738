"""The state of a run in two files, safetensors and JSON: a run that dies goes on where it was.

All draws follow from the seed and the step's number, so that a resumed run ends as the
uninterrupted one does.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import Dataset
from safetensors import safe_open
from safetensors.torch import save_file

from recbole_sdpo.data.examples import HistoryExamples
from recbole_sdpo.data.ratings import ratings
from recbole_sdpo.data.sequences import target_rows, training_sequences
from recbole_sdpo.errors import UserError
from recbole_sdpo.files import read_record, sha256, whole_file, write_record
from recbole_sdpo.lm.parts import gathered, parted_as
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.settings import Role, Settings, having
from recbole_sdpo.trainer.stage import Stage

STATE = "state"
"""The folder in that of a run."""

STATE_FILE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_state(run_dir: Path, stage: Stage, rest: dict[str, Any]) -> None:
    """Write the weights, the optimizer's moments, the stage's progress and ``rest`` (JSON).

    Until all of it is on the disk, the state of before counts.

    Raises:
        OSError: the disk is full, …
    """
    tensors = gathered(_tensors(stage), stage.accelerator.is_main_process)
    if not tensors:
        return
    folder = run_dir / STATE
    folder.mkdir(parents=True, exist_ok=True)
    # Never the one that state.json now points to.
    file = folder / f"{stage.name}-{stage.step}-{time.time_ns()}.safetensors"
    try:
        with whole_file(file) as part:
            save_file({name: value.contiguous() for name, value in tensors.items()}, part)
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


def _tensors(stage: Stage) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights and the optimizer's moments by name, be they in parts, and what the policy as it
    was at the epoch's begin has chosen."""
    examples = stage.examples
    if isinstance(examples, HistoryExamples) and examples.favourites is not None:
        yield "favourites", torch.from_numpy(examples.favourites)
    for name, weight in stage.model.lm.trainable().items():
        yield f"weight/{name}", weight
        for moment, value in stage.optimizer.state.get(weight, {}).items():
            yield f"{moment}/{name}", value


def holds_state(run_dir: Path) -> bool:
    """Is there a state in ``run_dir``, be it damaged?"""
    return (run_dir / STATE / STATE_FILE).is_file()


def read_state(run_dir: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote as JSON.

    Raises:
        UserError: it is damaged.
    """
    state = read_record(run_dir / STATE / STATE_FILE)
    if state is None:
        raise damaged(run_dir / STATE / STATE_FILE)
    return state


def read_state_of(run_dir: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The same, of a run that has this :func:`resume_identity`.

    Raises:
        UserError: it is damaged, or that run had other settings.
    """
    state = read_state(run_dir)
    # A setting that is younger than the state had its default, or did nothing; what else the state
    # does not say is not known.
    had = Settings().to_flat() | {"title_prior": 0.0} | state["settings"]
    other = [
        f"{key}={had.get(key)!r} (now {value!r})"
        for key, value in identity.items()
        if key in had and had[key] != value
    ]
    if other:
        raise UserError(
            f"resume={str(run_dir)!r}: that run had {', '.join(other)}; give each as it "
            "was, or take the version of this package that it was made with."
        )
    return state


def resume_identity(model: SDPOLLM, dataset: Dataset, processes: int) -> dict[str, Any]:
    """What a resumed run must share with the interrupted one, as JSON has it.

    Args:
        dataset: RecBole's, for training.
        processes: that train together.
    """
    sequences, rated = training_sequences(dataset), ratings(dataset, target_rows(dataset))
    rows = [sequences.items.values, sequences.items.lengths, sequences.user]
    rows += [] if rated is None else [rated]
    # what titles are made of is not all ours to set: RecBole's encoding, load_col, …
    titles = [model.encoder.tokens.values, model.encoder.tokens.lengths]
    data = {"training data": _digest(rows), "titles": _digest(titles)}
    theirs = {key: model.config[key] for key in sorted(having(Role.FIXED))}
    ours, free = model.settings.to_flat(), having(Role.FREE)
    shared = theirs | {key: value for key, value in ours.items() if key not in free}
    # auto is another precision on another machine
    rest = {"precision (dtype)": model.backbone.dtype, "processes": processes}
    return json.loads(json.dumps(shared | data | rest))


def _digest(arrays: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def broken_part(run_dir: Path) -> Path | None:
    """The file of the state in ``run_dir`` that is missing or damaged, if there is one."""
    state = read_record(run_dir / STATE / STATE_FILE)
    if state is None:
        return run_dir / STATE / STATE_FILE
    file = run_dir / STATE / state["tensors"]
    return None if file.is_file() and sha256(file) == state["sha256_of_tensors"] else file


@torch.no_grad()
def load_state(run_dir: Path, stage: Stage) -> None:
    """Put ``stage`` where it was: weights, moments, schedule and progress.

    Raises:
        UserError: the state is damaged.
    """
    if broken := broken_part(run_dir):
        raise damaged(broken)
    state = read_state(run_dir)
    with safe_open(run_dir / STATE / state["tensors"], framework="pt") as stream:
        names = set(stream.keys())
        for name, weight in stage.model.lm.trainable().items():
            weight.copy_(parted_as(weight, stream.get_tensor(f"weight/{name}")))
            moments = {
                moment: stream.get_tensor(f"{moment}/{name}")
                for moment in MOMENTS
                if f"{moment}/{name}" in names
            }
            if moments:
                stage.optimizer.state[weight] = {
                    moment: parted_as(weight, value) if value.ndim else value.to(weight.device)
                    for moment, value in moments.items()
                }
        if isinstance(stage.examples, HistoryExamples) and "favourites" in names:
            stage.examples.favourites = stream.get_tensor("favourites").numpy()
    stage.continue_from(state["progress"])


def damaged(file: Path) -> UserError:
    """The error of a file of a run's state."""
    return UserError(
        f"{file} is missing or damaged: it is not what the run wrote, which cannot be resumed; "
        "begin it in another folder."
    )
