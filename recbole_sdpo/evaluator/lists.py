"""Metrics of the lists that all users get from the whole catalogue: one number for all of them."""

from __future__ import annotations

from recbole_sdpo import compat

OF_LISTS = {kind.__name__.lower(): kind for kind in compat.OF_LISTS}
"""The metrics of what all users get, by RecBole's name."""


def is_of_lists(metric: str) -> bool:
    """Is ``metric``, such as ``ItemCoverage@10``, of what all users get, and not of each target's
    rank?"""
    return metric.lower().partition("@")[0] in OF_LISTS
