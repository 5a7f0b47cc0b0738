"""Keys that nobody reads."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from recbole.model.abstract_recommender import AbstractRecommender

from recbole_sdpo.errors import UserError, meant
from recbole_sdpo.settings import SETTINGS


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
        hint = meant(
            key,
            [*sorted(ours), *sorted(known)],
            "recbole-sdpo settings lists ours, RecBole's documentation its own.",
        )
        raise UserError(f"Unknown setting {key!r}={given[key]!r}; {hint}")


def _reads(model_class: type, key: str) -> bool:
    """Does the module of a model name the key, or one of those of RecBole that it builds on? Of the
    module that holds what all models build on, the classes of this one count alone."""
    classes = [cls for cls in model_class.__mro__ if issubclass(cls, AbstractRecommender)]
    modules = {cls: inspect.getmodule(cls) for cls in classes}
    texts = [
        inspect.getsource(cls if cls.__module__ == AbstractRecommender.__module__ else module)
        for cls, module in modules.items()
        if module and getattr(module, "__file__", None)
    ]
    return any(f'"{key}"' in text or f"'{key}'" in text for text in texts)
