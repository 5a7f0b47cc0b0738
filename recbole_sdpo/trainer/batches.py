"""A stage's batches: which trees stand in which, in which order, and a process's part of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from recbole_sdpo.data.examples import Examples
from recbole_sdpo.data.prompts import Prompts, batches
from recbole_sdpo.lm.forest import Forest
from recbole_sdpo.model.encoder import Encoder
from recbole_sdpo.ragged import exclusive_cumsum, places
from recbole_sdpo.random import generator
from recbole_sdpo.settings import CompleteStage

SORTED_TOGETHER = 256
"""Trees, for each 1,024 tokens of a batch, that are sorted by size together, so that it holds trees
of about one size: less padding."""

Plan = list[list[np.ndarray]]
"""For each optimizer step the trees of each of its batches, int64."""


@dataclass(frozen=True)
class Batch:
    """A process's part of a batch.

    Attributes:
        forest: of its trees.
        prompts: of the forest.
        items: int64 ``[T, 1 + K]``, its responses: each target and its negatives.
        targets: int64 ``[T]``, the numbers of its targets among all of the examples'.
        counts: is it the process's own? A process that has none is given another's, as each must
            take part in each sum over all processes.
    """

    forest: Forest
    prompts: Prompts
    items: np.ndarray
    targets: np.ndarray
    counts: bool = True

    @property
    def width(self) -> int:
        """Responses to a target, 1 + K."""
        return self.items.shape[1]

    @property
    def ends(self) -> torch.Tensor:
        """The last target of each tree, whose prompt is its longest, int64 ``[trees]``."""
        return torch.from_numpy(np.flatnonzero(np.diff(self.prompts.tree, append=-1)))

    def pin_memory(self) -> Batch:
        """The same batch, from which a GPU copies while the host goes on."""
        return replace(self, forest=self.forest.pin_memory())


@dataclass
class StageBatches:
    """Cuts the examples of a stage into batches, the same on every process, and prepares them.

    Args:
        stage: its name, which counts in what is drawn.
        limit: targets to an epoch, or None for all.
        process: this process's number and how many there are; it takes every n-th tree of a batch.
        workers: processes that prepare batches ahead; 0 for none.
        pinned: in memory from which a GPU copies.
    """

    stage: str
    settings: CompleteStage
    limit: int | None
    examples: Examples
    encoder: Encoder
    seed: int
    process: tuple[int, int] = (0, 1)
    workers: int = 0
    pinned: bool = False

    def __post_init__(self) -> None:
        self.sizes = self.examples.sizes(self.encoder.tokens.lengths)

    def plan(self, epoch: int) -> Plan:
        """The batches of an epoch."""
        rng = generator(self.seed, "batches", self.stage, epoch)
        order = rng.permutation(len(self.examples.targets))
        if self.limit is not None:
            seen = np.cumsum(self.examples.targets[order])
            # Up to the tree that reaches the limit, which may pass it: trees are not cut.
            order = order[: 1 + int(np.searchsorted(seen, self.limit))]
        if each := self.settings.targets_per_step:
            return self._of_equal_steps(order, each)
        return self._of_equal_batches(order, rng)

    def _of_equal_steps(self, order: np.ndarray, each: int) -> Plan:
        """``each`` targets to a step, in as many batches as they need."""
        # A tree belongs to the step of its first target.
        step = exclusive_cumsum(self.examples.targets[order]) // each
        return [self.cut(trees) for trees in np.split(order, np.flatnonzero(np.diff(step)) + 1)]

    def _of_equal_batches(self, order: np.ndarray, rng: np.random.Generator) -> Plan:
        """As many batches to a step as are asked for, each of trees of about one size."""
        together = SORTED_TOGETHER * max(1, self.settings.tokens_per_batch // 1024)
        pools = np.array_split(order, max(1, round(len(order) / together)))
        by_size = [pool[np.argsort(self.sizes[pool], kind="stable")] for pool in pools]
        cut = batches(self.sizes, self.settings.tokens_per_batch, np.concatenate(by_size))
        # Otherwise the batches of each pool would come from short to long.
        cut = [cut[number] for number in rng.permutation(len(cut))]
        each = self.settings.gradient_accumulation
        return [cut[first : first + each] for first in range(0, len(cut), each)]

    def cut(self, trees: np.ndarray) -> list[np.ndarray]:
        """``trees``, sorted by size, in batches of the stage's size."""
        cut = batches(self.sizes[trees], self.settings.tokens_per_batch)
        return [trees[rows] for rows in cut]

    def targets(self, plan: Plan) -> int:
        """Targets in a plan."""
        return sum(int(self.examples.targets[trees].sum()) for step in plan for trees in step)

    def loader(self, plan: Plan, first_step: int) -> DataLoader:
        """The batches of ``plan``, whose first step has this number in its stage.

        Of each batch this process has its part; where there are fewer trees than processes, it may
        have one that does not count.
        """
        numbered = enumerate(plan, first_step)
        draws = [draw for number, step in numbered for draw in self._draws(step, number)]
        return DataLoader(
            _Batches(draws, self.examples, self.encoder, self.stage, self.seed, self.process),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            generator=torch.Generator(),  # torch's loaders draw from the global one else
            pin_memory=self.pinned,
        )

    def _draws(self, step: list[np.ndarray], number: int) -> list[_Draw]:
        if not self.settings.targets_per_step:
            parts = enumerate(step)
            return [_Draw(trees, np.arange(len(trees)), number, part) for part, trees in parts]
        # One draw for the step, so that what is drawn does not depend on how it is cut.
        together = np.concatenate(step)
        ends = np.cumsum([len(trees) for trees in step])[:-1]
        owns = np.split(np.arange(len(together)), ends)
        return [_Draw(together, own, number, 0) for own in owns]


class _Draw(NamedTuple):
    """How a batch comes about.

    Attributes:
        trees: for which negatives are drawn together, int64.
        own: the places, among them, of the batch's own.
        step: the number of the optimizer step.
        part: the number of the draw in that step.
    """

    trees: np.ndarray
    own: np.ndarray
    step: int
    part: int


@dataclass
class _Batches(Dataset):
    """Batches, drawn and planted as they are asked for, which may be in another process."""

    draws: list[_Draw]
    examples: Examples
    encoder: Encoder
    stage: str
    seed: int
    process: tuple[int, int]

    def __post_init__(self) -> None:
        self.first_target = exclusive_cumsum(self.examples.targets)

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, number: int) -> Batch:
        trees, own, step, part = self.draws[number]
        prompts, items = self.examples.batch(trees, self.seed, self.stage, step, part)
        # All processes draw for all trees, and each takes its part: how many processes there are
        # changes nothing of what is drawn.
        mine = own[self.process[0] :: self.process[1]]
        counts = len(mine) > 0
        mine = mine if counts else own[:1]
        prompts, items = prompts.select(mine), items[prompts.target_index(mine)]
        each = self.examples.targets[trees[mine]]
        targets = np.repeat(self.first_target[trees[mine]], each) + places(each)
        return Batch(self.encoder.forest(prompts, items), prompts, items, targets, counts)


def _unchanged(batch: Any) -> Any:
    return batch
