"""The kinds of trials, by name."""

from types import ModuleType

from tests.faults import configurations, crashes, disks, kills, races, signals, tampering

KINDS: dict[str, ModuleType] = {module.__name__.rpartition(".")[2]: module for module in (configurations, kills, crashes, disks, signals, races, tampering)}
"""Each has ``attempt(trial)``, which raises ``Wrong``, and how many trials its long and short versions are."""
