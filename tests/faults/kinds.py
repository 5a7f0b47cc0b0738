"""The kinds of trials, by name."""

from types import ModuleType

from tests.faults import configurations, crashes, kills

KINDS: dict[str, ModuleType] = {module.__name__.rpartition(".")[2]: module for module in (configurations, crashes, kills)}
"""Each has ``attempt(trial)``, which raises ``Wrong``, and how many trials its long and short versions are."""
