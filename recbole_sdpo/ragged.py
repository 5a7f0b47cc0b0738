"""Rows of unequal length in two flat arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Integer rows of unequal length.

    Attributes:
        values: int64 ``[sum of lengths]``, the rows one after another.
        lengths: int64 ``[rows]``.
    """

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[int] | np.ndarray]) -> Ragged:
        """Pack ``rows``, any of which may be empty."""
        arrays = [np.asarray(row, dtype=np.int64) for row in rows]
        values = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        return cls(values, np.array([len(row) for row in arrays], dtype=np.int64))

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> Ragged:
        """The rows of an integer matrix."""
        return cls(matrix.astype(np.int64).ravel(), np.full(len(matrix), matrix.shape[1], np.int64))

    @classmethod
    def grouped(cls, values: np.ndarray, owner: np.ndarray, rows: int = 0) -> Ragged:
        """A row for each owner, a number from 0, with its ``values`` in their order; ``rows`` at
        least."""
        return cls(values[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=rows))

    @property
    def owner(self) -> np.ndarray:
        """int64 ``[sum of lengths]``: the row of each entry of ``values``."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 ``[rows]``: where each row begins in ``values``."""
        return exclusive_cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        start = self.starts[row]
        return self.values[start : start + self.lengths[row]]

    def take(self, rows: np.ndarray) -> Ragged:
        """The rows with the given indices, in that order, repeats allowed."""
        return self.cut(rows, np.zeros_like(rows), self.lengths[rows])

    def cut(self, rows: np.ndarray, first: np.ndarray, lengths: np.ndarray) -> Ragged:
        """From each of the given rows, ``lengths`` entries from place ``first`` on."""
        return Ragged(
            self.values[np.repeat(self.starts[rows] + first, lengths) + places(lengths)], lengths
        )

    def join(self, counts: np.ndarray) -> Ragged:
        """The first ``counts[0]`` rows as one, the next ``counts[1]`` as another, and so on."""
        return Ragged(self.values, segment_sums(self.lengths, counts))

    def beside(self, *others: Ragged) -> Ragged:
        """Each row followed by the same row of each of ``others``."""
        parts = (self, *others)
        lengths = np.stack([part.lengths for part in parts], axis=1)
        starts = exclusive_cumsum(lengths.ravel()).reshape(lengths.shape)
        values = np.empty(lengths.sum(), np.int64)
        for part, start in zip(parts, starts.T, strict=True):
            values[np.repeat(start, part.lengths) + places(part.lengths)] = part.values
        return Ragged(values, lengths.sum(1))

    @classmethod
    def stack(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of each of ``parts``, one part after another."""
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.lengths for part in parts]),
        )

    def padded(self, fill: int, width: int | None = None) -> np.ndarray:
        """int64 ``[rows, width]``, each row followed by ``fill``. By default all fit exactly."""
        width = int(self.lengths.max(initial=0)) if width is None else width
        matrix = np.full((len(self), width), fill, dtype=np.int64)
        matrix[np.arange(width) < self.lengths[:, None]] = self.values
        return matrix


def exclusive_cumsum(counts: np.ndarray) -> np.ndarray:
    """``[0, c0, c0 + c1, …]`` with the length of ``counts``."""
    return np.cumsum(counts) - counts


def places(counts: np.ndarray) -> np.ndarray:
    """``0 … c0 - 1, 0 … c1 - 1, …``: the place of each entry in its segment."""
    return np.arange(counts.sum()) - np.repeat(exclusive_cumsum(counts), counts)


def segment_sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of consecutive segments of ``values``, ``counts`` long; 0 for an empty one."""
    total = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(counts)
    return total[ends] - total[ends - counts]
