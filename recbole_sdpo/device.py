"""Can the GPUs that a run asks for serve it?"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path

import torch
from recbole.config import Config

from recbole_sdpo import compat
from recbole_sdpo.errors import UserError
from recbole_sdpo.settings import MODEL

BUILDS = "https://pytorch.org/get-started"
DRIVER = Path("/proc/driver/nvidia/gpus")
"""There on Linux where a GPU of NVIDIA's is."""


def check_device(config: Config) -> None:
    """Refuse GPUs that are not there, which RecBole replaces by the CPU, and those that fail in the
    middle of a run.

    Raises:
        UserError: ``gpu_id`` or ``CUDA_VISIBLE_DEVICES`` names a GPU that is not there, or that
            this build of torch has no kernels for; there are more processes than GPUs, or no NCCL
            to join them; or ``dtype`` is one that a GPU has not.
    """
    external = config.external_config_dict
    asked = [part.strip() for part in config["gpu_id"].split(",")]
    asked = asked[: asked.index("-1")] if "-1" in asked else [part for part in asked if part]
    count = torch.cuda.device_count() if config["device"].type == "cuda" else 0
    if external.get("use_gpu") is False and count:
        raise UserError(
            "use_gpu=False has no effect in RecBole; give gpu_id='' for a run on the CPU."
        )
    # a value that is left in the environment of a machine without GPUs asks for none
    by_shell = compat.VISIBLE_GPUS is not None and "gpu_id" not in external
    which = f"{'CUDA_VISIBLE_DEVICES' if by_shell else 'gpu_id'}={config['gpu_id']!r}"
    if count < len(asked) and (count if by_shell else "gpu_id" in external):
        raise UserError(
            f"{which} asks for {len(asked)} of this machine's GPUs and torch {torch.__version__} "
            f"finds {count}: {_remedy()}, or set gpu_id='' for the CPU."
        )
    if asked and not count and DRIVER.is_dir():
        where = f" by {which}" if by_shell else ""
        getLogger().warning(
            f"This run is on the CPU, as torch {torch.__version__} cannot use the GPU that is "
            f"here{where}: {_remedy()}."
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if count and processes > count:
        raise UserError(
            f"A launch of {processes} processes needs as many GPUs, and there are {count}; start "
            f"{count}, or set gpu_id=''."
        )
    if count and processes > 1 and not torch.distributed.is_nccl_available():
        raise UserError(
            f"A launch of {processes} processes needs NCCL between its GPUs, which torch "
            f"{torch.__version__} is built without; install a build that has it ({BUILDS}/locally),"
            " or set gpu_id=''."
        )
    for number in range(count):
        _check_gpu(config, number)


def _check_gpu(config: Config, number: int) -> None:
    gpu = torch.cuda.get_device_properties(number)
    what = f"GPU {number} ({gpu.name}, of compute capability {gpu.major}.{gpu.minor})"
    built_for = torch.cuda.get_arch_list()
    if torch.version.cuda and not is_served((gpu.major, gpu.minor), built_for):
        raise UserError(
            f"{what} is none that torch {torch.__version__} is built for "
            f"({', '.join(built_for)}); install a build that has it "
            f"({BUILDS}/previous-versions), or set gpu_id='' for the CPU."
        )
    halves = torch.version.hip or gpu.major >= 8  # others torch emulates, many times slower
    dtype = config.settings.backbone.dtype
    if config["model"] == MODEL and dtype in ("bfloat16", "mixed") and not halves:
        raise UserError(
            f"dtype={dtype!r} needs a GPU of compute capability 8.0 or later, and {what} is "
            "older; set dtype=float32."
        )


def is_served(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Has a build of torch kernels that a GPU runs?

    A kernel runs on its own generation of GPUs (``sm_86`` on 8.9), from its own on, and code that
    is compiled on the way (``compute_80``) on all later ones.

    Args:
        capability: of the GPU, such as (8, 6).
        built_for: as torch lists them, such as sm_80, sm_90a and compute_90.
    """
    kernels = re.findall(r"\b(sm|compute)_(\d+)(\d)([a-z]?)", " ".join(built_for))
    return any(
        (built := (int(major), int(minor))) == capability
        or (not only and built < capability and (kind == "compute" or built[0] == capability[0]))
        for kind, major, minor, only in kernels
    )


def _remedy() -> str:
    """What brings a GPU within torch's reach, as far as can be told."""
    if not (torch.version.cuda or torch.version.hip):
        return f"it is built without CUDA; install a build that has it ({BUILDS}/locally)"
    return (
        "see in nvidia-smi which are there, and that the driver is new enough for CUDA "
        f"{torch.version.cuda}"
    )
