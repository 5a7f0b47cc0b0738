"""The kinds of trials: every module here that has ``attempt(trial)``, which makes one of them.

``attempt`` raises :class:`~tests.faults.judge.Wrong`, or returns "result" or "sentence". ``LONG``
and ``SHORT`` are how many trials ``make faults`` and ``make test`` make.
"""

import importlib
import pkgutil
from types import ModuleType

import tests.faults

_NAMES = sorted(
    module.name
    for module in pkgutil.iter_modules(tests.faults.__path__)
    if not module.name.startswith(("test_", "_"))
)
_MODULES = {
    name: importlib.import_module(f"tests.faults.{name}")
    for name in _NAMES
    if name != __name__.rpartition(".")[2]
}

KINDS: dict[str, ModuleType] = {
    name: module for name, module in _MODULES.items() if hasattr(module, "attempt")
}
"""By name."""
