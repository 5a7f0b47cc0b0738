"""The kinds of trials, by name."""

from types import ModuleType

from tests.faults import configurations, crashes, disks, foreign, kills, mutations, races, signals, tampering

_MODULES = (configurations, mutations, kills, crashes, disks, signals, races, tampering, foreign)

KINDS: dict[str, ModuleType] = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
"""Each has ``attempt(trial)``, which raises ``Wrong``, and how many trials its long and short versions are."""
