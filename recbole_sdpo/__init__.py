"""A language model as a recommender in RecBole: SFT, then S-DPO. Importing this registers ``SDPO-LLM`` with RecBole."""

from recbole_sdpo.registry import register
from recbole_sdpo.version import __version__

__all__ = ["__version__"]

register()
