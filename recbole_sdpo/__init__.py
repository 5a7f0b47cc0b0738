"""A language model as a recommender in RecBole: SFT, then S-DPO. Importing this registers
``SDPO-LLM`` with RecBole."""

# ruff: noqa: E402  what follows imports PyTorch
from recbole_sdpo.libraries import check_libraries
from recbole_sdpo.threads import spin_briefly

check_libraries()
spin_briefly()

from recbole_sdpo.objectives import register_objective
from recbole_sdpo.registry import register
from recbole_sdpo.version import __version__

__all__ = ["__version__", "register_objective"]

register()
