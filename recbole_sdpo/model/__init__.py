"""The recommender: RecBole's data and a language model joined."""

from recbole_sdpo.model.sdpo_llm import SDPOLLM

__all__ = ["SDPOLLM"]
