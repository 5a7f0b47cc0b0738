"""The best weights for each candidate set: trained once, chosen for each by its own validation."""

from __future__ import annotations

import copy
import hashlib
import json
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.trainer import Trainer
from recbole.utils import calculate_valid_score, dict2str
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recbole_sdpo.compat import load_rest
from recbole_sdpo.files import whole_file
from recbole_sdpo.lm.language_model import FROZEN
from recbole_sdpo.lm.parts import gathered, own, parted_as
from recbole_sdpo.trainer.state import damaged

SELECTION = "selection"
"""The folder in that of a run."""

Metrics = dict[str, float]


class BestWeights:
    """Keeps, while ``trainer`` trains, the weights that validate best on each candidate set.

    Args:
        trainer: of RecBole; its ``fit`` calls this object after each of its own validations
            (``callback_fn``).
        loaders: for each evaluation mode its validation loader.
        folder: where the best weights lie meanwhile, so that a resumed run has them; None keeps
            them in memory.
        later_of_equals: of epochs that validate alike keep the last, as RecBole's early stopping
            does, and not the first, as our trainer does.

    Attributes:
        valid: for each mode the metrics of its best weights.
    """

    def __init__(
        self,
        trainer: Trainer,
        loaders: dict[str, AbstractDataLoader],
        folder: Path | None,
        later_of_equals: bool = False,
    ) -> None:
        self.trainer, self.loaders, self.folder = trainer, loaders, folder
        self.later_of_equals = later_of_equals
        self.valid: dict[str, Metrics] = {}
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._rest: dict[str, dict[str, Any]] = {}

    def begin(self, stage: str, validated: bool) -> None:
        """Forget all; go on with what an interrupted run of the stage left, if it had validated.

        Raises:
            UserError: what it left is missing or damaged.
        """
        self.valid, self._weights, self._rest, self._stage = {}, {}, {}, stage
        if validated and self.folder:
            state = _changing(self.trainer.model)
            for mode in self.loaders:
                self.valid[mode], weights = _read(self._file(self.folder, mode))
                self._weights[mode] = {
                    name: own(parted_as(state[name], value)).cpu()
                    for name, value in weights.items()
                }

    def __call__(self, epoch: int | None = None, score: float | None = None) -> None:
        """Validate on each candidate set, and keep the weights where that is better than before."""
        for mode, loader in self.loaders.items():
            metrics = dict(self.trainer.evaluate(loader, load_best_model=False))
            getLogger().info(f"valid {mode}: {dict2str(metrics)}")
            if self._better(metrics, self.valid.get(mode)):
                self._keep(mode, metrics)

    def begin_with(self, valid: dict[str, Metrics]) -> None:
        """Keep the weights that the model has; ``valid`` are their metrics on each set."""
        for mode in self.loaders:
            self._keep(mode, valid[mode])

    def restore(self, mode: str) -> None:
        """Put the weights that were best on ``mode`` into the model."""
        restore(self.trainer.model, self._weights[mode])
        load_rest(self.trainer.model, self._rest.get(mode))

    def _better(self, new: Metrics, old: Metrics | None) -> bool:
        if not old:
            return True
        metric = self.trainer.valid_metric
        now, before = calculate_valid_score(new, metric), calculate_valid_score(old, metric)
        if now == before:
            return self.later_of_equals
        return (now > before) == bool(self.trainer.valid_metric_bigger)

    def _keep(self, mode: str, metrics: Metrics) -> None:
        model = self.trainer.model
        self.valid[mode], self._weights[mode] = metrics, snapshot(model)
        self._rest[mode] = copy.deepcopy(model.other_parameter())
        if self.folder:
            main = PartialState().is_main_process
            weights = gathered(_changing(model).items(), main)
            if main:
                self._write(self.folder, mode, weights)

    def _file(self, folder: Path, mode: str) -> Path:
        return folder / f"{self._stage}-{mode}.safetensors"

    def _write(self, folder: Path, mode: str, weights: dict[str, Tensor]) -> None:
        """Write the best weights of ``mode`` and their metrics, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        valid = json.dumps(self.valid[mode])
        about = {"valid": valid, "sha256": _digest(valid, weights)}
        with whole_file(self._file(folder, mode)) as part:
            save_file(weights, part, about)


def _read(file: Path) -> tuple[Metrics, dict[str, Tensor]]:
    """Metrics and weights that were best on a candidate set."""
    try:
        with safe_open(file, framework="pt") as stream:
            about, names = stream.metadata(), stream.keys()
            weights = {name: stream.get_tensor(name) for name in names}
        whole = about["sha256"] == _digest(about["valid"], weights)
    except (OSError, SafetensorError, KeyError, TypeError):
        whole = False
    if not whole:
        raise damaged(file)
    return json.loads(about["valid"]), weights


def _digest(valid: str, weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(valid.encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy, on the CPU, of what training changes in ``model``, or in this process's part of it:
    trained parameters and buffers."""
    return {name: own(value).to("cpu", copy=True) for name, value in _changing(model).items()}


@torch.no_grad()
def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put a :func:`snapshot` back."""
    state = _changing(model)
    for name, value in weights.items():
        own(state[name]).copy_(value)


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """What training changes in ``model``, its trained parameters and its buffers, by name: what is
    tied once, and nothing of a frozen reference."""
    everything = chain(model.named_parameters(), model.named_buffers())
    return {
        name: value
        for name, value in everything
        if (value.requires_grad or not isinstance(value, nn.Parameter)) and FROZEN not in name
    }
