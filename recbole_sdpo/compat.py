"""What RecBole 1.2.1 needs on today's libraries, an entry each. tests/test_compat.py tells when one is no longer needed.

What a version pin cures is in setup.cfg: numpy<2 (ray 2.6 uses ``np.bool8``), setuptools<81 (``pkg_resources``),
pandas<3 (in-place ``fillna`` on a column).
"""

from __future__ import annotations

import warnings

import torch
from recbole.trainer import Trainer


def load_best(trainer: Trainer) -> None:
    """Load the checkpoint that ``trainer`` has just written.

    RecBole's own loading fails on torch >= 2.6, whose ``torch.load`` refuses the ``Config`` object that RecBole pickles
    (https://github.com/RUCAIBox/RecBole/issues/2142). The file is this process's own, so unpickling it is safe.
    """
    checkpoint = torch.load(trainer.saved_model_file, map_location=trainer.device, weights_only=False)
    trainer.model.load_state_dict(checkpoint["state_dict"])
    trainer.model.load_other_parameter(checkpoint.get("other_parameter"))


def quiet_warnings() -> None:
    """Hide warnings about RecBole's own code that a user can do nothing about: chained assignment in pandas 2."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"recbole\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"recbole\.")
