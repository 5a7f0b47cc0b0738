"""Keys that nobody reads."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from recbole.model.abstract_recommender import AbstractRecommender

from recbole_sdpo.errors import UserError, meant
from recbole_sdpo.settings import MODEL, SETTINGS

OF_SOME_MODELS = {"embedding_size", "reg_weight", "mask_ratio", "ft_ratio", "eta"}
"""Keys whose names sound as if every model had them."""


def check_unknown(
    given: Mapping[str, Any],
    known: set[str],
    ours: Collection[str],
    model_class: type | None = None,
) -> None:
    """Refuse keys that nobody reads.

    Args:
        given: what the user set.
        known: RecBole's keys.
        ours: those of our settings that count for the model; the others do no harm.
        model_class: of RecBole's, of which a few read keys that are not in their defaults.

    Raises:
        UserError: naming the key and the nearest right one.
    """
    for key in given:
        if key in known or key in SETTINGS or (model_class and _reads(model_class, key)):
            continue
        if key in OF_SOME_MODELS:
            who = model_class.__name__ if model_class else MODEL
            raise UserError(
                f"{key}={given[key]!r} is for other models of RecBole; {who} does not read it."
            )
        hint = meant(
            key,
            [*sorted(ours), *sorted(known)],
            "recbole-sdpo settings lists ours, RecBole's documentation its own.",
        )
        raise UserError(f"Unknown setting {key!r}={given[key]!r}; {hint}")


def _reads(model_class: type, key: str) -> bool:
    """Does the module of a model name the key, or one of those of RecBole that it builds on? Of the
    module that holds what all models build on, the classes of this one count alone, and of a
    notebook so does the class. Of one without a source nobody can tell: it may."""
    for cls in model_class.__mro__:
        if not issubclass(cls, AbstractRecommender):
            continue
        module = inspect.getmodule(cls)
        alone = cls.__module__ in ("__main__", AbstractRecommender.__module__)
        try:
            text = inspect.getsource(cls if alone or module is None else module)
        except (OSError, TypeError):
            return True
        if f'"{key}"' in text or f"'{key}'" in text:
            return True
    return False
