"""Weights for more than one candidate set: trained once, chosen for each by its own validation."""

from __future__ import annotations

import copy
import json
import os
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.trainer import Trainer
from recbole.utils import calculate_valid_score, dict2str
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Selection:
    """Keeps, while ``trainer`` trains, the weights that validate best on each of some further candidate sets.

    Args:
        trainer: of RecBole; its ``fit`` calls this object after each of its own validations (``callback_fn``).
        loaders: for each evaluation mode its validation loader.
        folder: where the best weights lie meanwhile, so that a resumed run has them; None keeps them in memory.
    """

    def __init__(self, trainer: Trainer, loaders: dict[str, AbstractDataLoader], folder: Path | None) -> None:
        self.trainer, self.loaders, self.folder = trainer, loaders, folder
        self.valid: dict[str, dict[str, float]] = {}
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._rest: dict[str, dict[str, Any]] = {}

    def begin(self, stage: str, resume: bool) -> None:
        """Forget what was kept; go on with what an interrupted run of the stage had kept."""
        self.valid, self._weights, self._rest, self._stage = {}, {}, {}, stage
        for mode in self.loaders if resume else ():
            file = self._file(mode)
            if file.is_file():
                self._weights[mode] = load_file(file)
                self.valid[mode] = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))

    def __call__(self, epoch: int | None = None, score: float | None = None) -> None:
        """Validate on each candidate set, and keep the weights where that is better than before."""
        metric, bigger = self.trainer.valid_metric, self.trainer.valid_metric_bigger
        for mode, loader in self.loaders.items():
            result = dict(self.trainer.evaluate(loader, load_best_model=False))
            getLogger().info(f"valid {mode}: {dict2str(result)}")
            new, old = (calculate_valid_score(found, metric) if found else None for found in (result, self.valid.get(mode)))
            if old is None or (new > old if bigger else new < old):
                self.valid[mode], self._weights[mode] = result, snapshot(self.trainer.model)
                self._rest[mode] = copy.deepcopy(self.trainer.model.other_parameter())
                if self.folder and PartialState().is_main_process:
                    self._write(mode)

    def restore(self, mode: str) -> None:
        """Put the weights that were best on ``mode`` into the model."""
        restore(self.trainer.model, self._weights[mode])
        self.trainer.model.load_other_parameter(self._rest.get(mode))

    def _file(self, mode: str) -> Path:
        return self.folder / f"{self._stage}-{mode}.safetensors"

    def _write(self, mode: str) -> None:
        """The weights first, whole or not at all: an epoch that is run again finds the same score and writes nothing new."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(mode)
        for target, write in (
            (file, lambda part: save_file(self._weights[mode], part)),
            (file.with_suffix(".json"), lambda part: part.write_text(json.dumps(self.valid[mode]), encoding="utf-8")),
        ):
            part = target.with_name(target.name + ".part")
            write(part)
            os.replace(part, target)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy, on the CPU, of what training changes in ``model``: trained parameters and buffers."""
    return {name: value.detach().cpu().clone() for name, value in _changing(model).items()}


@torch.no_grad()
def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put a :func:`snapshot` back."""
    state = _changing(model)
    for name, value in weights.items():
        state[name].copy_(value)


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """By name, each once, whatever is tied to it."""
    everything = chain(model.named_parameters(), model.named_buffers())
    return {name: value for name, value in everything if value.requires_grad or not isinstance(value, nn.Parameter)}
