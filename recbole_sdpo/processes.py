"""The processes of one launch: are they alike, and has one of them ended?"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import DistError

from recbole_sdpo.config import RunConfig
from recbole_sdpo.errors import UserError
from recbole_sdpo.inputs import Inputs
from recbole_sdpo.settings import Role, having


def check_alike(config: RunConfig, inputs: Inputs) -> None:
    """Do all processes read the same files, with the same versions and settings?

    Raises:
        UserError: naming what differs, on each of them.
    """
    if PartialState().num_processes == 1:
        return
    without = having(Role.IDLE) | {"device"}
    settings = config.final_config_dict | config.settings.to_flat()
    mine: dict[str, Any] = {
        key: str(value) for key, value in settings.items() if key not in without
    }
    first, *others = gather_object([mine | inputs.digests])
    for process, other in enumerate(others, 1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise UserError(
                    f"The processes of a launch must be alike: {inputs.named(name)} is "
                    f"{first.get(name)} for process 0 and {other.get(name)} for process {process}."
                )


def lost(error: RuntimeError) -> bool:
    """Did a sum over all processes fail, as it does when one of them has ended?"""
    return isinstance(error, DistError) or "gloo" in str(error)
