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

import torch
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import pop
from recbole.trainer import Trainer
from recbole.utils import get_model
from torch import Tensor, nn

from recbole_sdpo.errors import UserError


def load_best(trainer: Trainer) -> None:
    """Load the checkpoint that ``trainer`` has just written.

    RecBole's own loading fails on torch >= 2.6, whose ``torch.load`` refuses the ``Config`` object that RecBole pickles
    (https://github.com/RUCAIBox/RecBole/issues/2142). The file is this process's own, so unpickling it is safe.
    """
    checkpoint = torch.load(trainer.saved_model_file, map_location=trainer.device, weights_only=False)
    trainer.model.load_state_dict(checkpoint["state_dict"])
    trainer.model.load_other_parameter(checkpoint.get("other_parameter"))


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


@contextmanager
def same_gpus() -> Iterator[None]:
    """Leave the visible GPUs as they are: RecBole sets them by ``gpu_id``, for the whole process, wherever a ``Config`` is made."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


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
