"""What must be worked round in RecBole 1.2.1 and its neighbours. tests/test_compat.py tells when an entry is no longer needed.

What a version pin cures is in setup.cfg: numpy<2 (ray 2.6 uses ``np.bool8``), setuptools<81 (``pkg_resources``),
pandas<3 (in-place ``fillna`` on a column), scipy<1.13 (``dok_matrix._update``, which LightGCN and its kin fill).
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any

import torch
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.evaluator import metrics
from recbole.evaluator.collector import DataStruct
from recbole.model.general_recommender import pop
from recbole.trainer import Trainer
from recbole.utils import get_model
from torch import Tensor, nn

from recbole_sdpo.errors import UserError
from recbole_sdpo.values import Loader, check_values, read_arguments, read_yaml, value


def load_best(trainer: Trainer) -> None:
    """Load the checkpoint that ``trainer`` has just written.

    RecBole's own loading fails on torch >= 2.6, whose ``torch.load`` refuses the ``Config`` object that RecBole pickles
    (https://github.com/RUCAIBox/RecBole/issues/2142). The file is this process's own, so unpickling it is safe.
    """
    checkpoint = torch.load(trainer.saved_model_file, map_location=trainer.device, weights_only=False)
    trainer.model.load_state_dict(checkpoint["state_dict"])
    trainer.model.load_other_parameter(checkpoint.get("other_parameter"))


def take_values_as_data() -> None:
    """Have RecBole's ``Config`` read values, which it evaluates as Python: ``__import__('os').system(…)`` runs, ``self`` is its ``self``.

    Its YAML loader also builds Python's objects, and changes the loader of the whole process. Reported nowhere that we found;
    recbole/config/configurator.py, lines 97 to 140.
    """
    Config._build_yaml_loader = lambda self: Loader
    Config._convert_config_dict = _convert_config_dict
    Config._load_config_files = _load_config_files
    Config._load_cmd_line = _load_cmd_line


def _convert_config_dict(self: Config, config_dict: dict[str, Any]) -> dict[str, Any]:
    values = check_values(config_dict)
    return check_values({key: value(item) if isinstance(item, str) else item for key, item in values.items()})


def _load_config_files(self: Config, files: list[str] | None) -> dict[str, Any]:
    return {key: item for file in files or () for key, item in read_yaml(file).items()}


def _load_cmd_line(self: Config) -> dict[str, Any]:
    settings, rest = read_arguments(() if "ipykernel_launcher" in sys.argv[0] else sys.argv[1:])
    if rest:
        getLogger().warning(f"command line args [{' '.join(rest)}] will not be used in RecBole")
    return settings


def import_models() -> None:
    """Import RecBole's sequential models and leave autograd's anomaly detection as it was.

    The module of SINE turns it on as it is imported, for every model of the process: each backward pass then looks for NaN
    and records stack traces. Reported nowhere that we found; recbole/model/sequential_recommender/sine.py, line 25.
    """
    before = torch.is_anomaly_enabled()
    importlib.import_module("recbole.model.sequential_recommender")
    torch.autograd.set_detect_anomaly(before)


class Pop(pop.Pop):
    """RecBole's, which counts an item once a batch, however often it is there (https://github.com/RUCAIBox/RecBole/issues/2198).

    And it counts the negatives that RecBole's loader puts among the items of a model that learns from labels; reported nowhere that we
    found.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.label = config["LABEL_FIELD"]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        item = interaction[self.ITEM_ID]
        met = item[interaction[self.label] > 0] if self.label in interaction else item
        self.item_cnt += torch.bincount(met, minlength=self.n_items)[:, None]
        self.max_cnt = self.item_cnt.max(dim=0)[0]
        return self.fake_loss.new_zeros(1, requires_grad=True)


class GAUC(metrics.GAUC):
    """RecBole's, which returns a number of NumPy's with 32 bits, neither rounded nor fit for JSON. Reported nowhere that we found."""

    def calculate_metric(self, dataobject: DataStruct) -> dict[str, float]:
        return {name: round(float(result), self.decimal_place) for name, result in super().calculate_metric(dataobject).items()}


def model_class(name: str) -> type[nn.Module]:
    """The model that RecBole has under ``name``, or what stands in for it here."""
    return Pop if name == "Pop" else get_model(name)


def make_folders(config: Config) -> None:
    """Make RecBole's folders, which it makes without allowing for another process that makes them at the same moment."""
    for folder in (os.path.join("log", config["model"]), config["checkpoint_dir"]):
        os.makedirs(folder, exist_ok=True)


@contextmanager
def no_arguments() -> Iterator[None]:
    """Hide the arguments of the program, which RecBole takes for its settings wherever a ``Config`` is made."""
    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = given


def check_launcher() -> None:
    """Refuse ``accelerate launch --cpu --num_processes 2``, which starts a single process.

    It leaves a master address without a world size (https://github.com/huggingface/accelerate/issues/2741).

    Raises:
        UserError: naming the command that does start several.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process whatever --num_processes says; use torchrun --nproc_per_node=2 "
            "run_recbole_sdpo.py …, which accelerate joins."
        )


def quiet_warnings() -> None:
    """Hide warnings about RecBole's own code that a user can do nothing about: chained assignment in pandas 2."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"recbole\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"recbole\.")
