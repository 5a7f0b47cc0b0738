"""One random generator for each purpose, so that a draw added for one moves no other."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 32-bit seed that belongs to ``purpose`` alone, such as ``("negatives", "sdpo", epoch)``."""
    key = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in purpose]
    return int(np.random.SeedSequence([seed, *key]).generate_state(1)[0])


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for ``purpose``."""
    return np.random.default_rng(derive_seed(seed, *purpose))


@contextmanager
def recbole_draws(seed: int, *purpose: str | int) -> Iterator[None]:
    """Give RecBole's samplers, which draw from NumPy's global state, a state for ``purpose``;
    restore it after."""
    state = np.random.get_state()
    np.random.seed(derive_seed(seed, *purpose))
    try:
        yield
    finally:
        np.random.set_state(state)
