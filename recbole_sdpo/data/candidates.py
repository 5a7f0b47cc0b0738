"""Candidate sets that are the same for every model: drawn once, given by a file, or the whole
catalogue, before any model is built, and fingerprinted."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from logging import getLogger

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader, NegSampleDataLoader
from recbole.data.dataset import Dataset
from recbole.sampler.sampler import AbstractSampler

from recbole_sdpo.data.candidate_lists import ROWS_AT_ONCE, CandidateLists
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.negatives import NegativeSampler, is_in
from recbole_sdpo.data.sequences import FEWEST_EVENTS, asked_alike, met_items, users_and_targets
from recbole_sdpo.data.whole_catalogue import (
    CatalogueEvalDataLoader,
    WithoutMet,
    items_of_met_titles,
)
from recbole_sdpo.errors import UserError
from recbole_sdpo.random import derive_seed, recbole_draws


class PopulationSampler(AbstractSampler):
    """RecBole's distributions over a given population of items.

    RecBole's own counts popularity over what the model's kind of dataset holds and takes its
    exponent from the training negatives, so that two models would meet candidates of two
    distributions.

    Args:
        population: an item id for each interaction.
        item_num: number of item ids, padding included.
        distribution: ``uniform`` over all items, or ``popularity`` in the population.
    """

    def __init__(self, population: np.ndarray, item_num: int, distribution: str) -> None:
        self._population, self._item_num = population, item_num
        super().__init__(distribution, alpha=1.0)

    def _uni_sampling(self, sample_num: int) -> np.ndarray:
        return np.random.randint(1, self._item_num, sample_num)

    def _get_candidates_list(self) -> list[int]:
        return self._population.tolist()

    def get_used_ids(self) -> None:
        """None: what may not be drawn is :class:`NegativeSampler`'s business."""


class FrozenCandidates:
    """Takes a sampler's place in an evaluation loader and gives each target the same negatives
    every time.

    Args:
        phase: ``valid`` or ``test``.
        user: int64 ``[T]``.
        target: int64 ``[T]``.
        negatives: int64 or int32 ``[T, N]``.
        place: int64 ``[T]``, that of each target in its list, where a file gives the lists; those
            that are drawn have no order.
    """

    def __init__(
        self,
        phase: str,
        user: np.ndarray,
        target: np.ndarray,
        negatives: np.ndarray,
        place: np.ndarray | None = None,
    ) -> None:
        self.phase, self.user, self.target, self.negatives = phase, user, target, negatives
        self.place = place
        # A pair of user and target as one number, to be looked up in a sorted array.
        self._items = 1 + int(target.max(initial=0))
        self._pairs = user * self._items + target
        self._order = np.argsort(self._pairs)

    def lists(self) -> np.ndarray:
        """All candidates, ``[T, 1 + N]``: as the file has them, or else the target first."""
        place = np.zeros(len(self.target), np.int64) if self.place is None else self.place
        items = np.empty((len(self.target), 1 + self.negatives.shape[1]), self.negatives.dtype)
        own = np.arange(items.shape[1]) == place[:, None]
        items[own], items[~own] = self.target, self.negatives.reshape(-1)
        return items

    def holding_met(self, users: np.ndarray, items: np.ndarray) -> int:
        """How many lists hold a negative that their user has met.

        Args:
            users, items: int64 ``[pairs]``, who has met what, in the order of :func:`met_items`.
        """
        each, holding = 1 + int(max(items.max(initial=0), self.negatives.max(initial=0))), 0
        met = users * each + items
        for first in range(0, len(self.user), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            pairs = self.user[some, None] * each + self.negatives[some]
            holding += int(is_in(pairs, met).any(1).sum())
        return holding

    def sample_by_user_ids(
        self, user_ids: Sequence[int], item_ids: Sequence[int], num: int
    ) -> torch.Tensor:
        """The frozen negatives in RecBole's layout: the first of every target, then the second
        of every target, …"""
        user, target = np.asarray(user_ids, np.int64), np.asarray(item_ids, np.int64)
        wanted = user * self._items + target
        rows = self._order[
            np.minimum(
                np.searchsorted(self._pairs, wanted, sorter=self._order), len(self._order) - 1
            )
        ]
        # The search gives a place for whatever is asked: a pair that is not there shows here.
        if (self.user[rows] != user).any() or (self.target[rows] != target).any():
            raise KeyError("A target was asked for that the candidates were not frozen for.")
        return torch.from_numpy(self.negatives[rows, :num].T.reshape(-1).astype(np.int64))


def freeze(
    loader: AbstractDataLoader,
    parts: Sequence[Dataset],
    catalogue: Catalogue,
    seed: int,
    exclude_history: bool = True,
    setting: str = "eval_args.mode",
) -> bool:
    """Fix the candidates of ``loader``: those that it samples, or the whole catalogue.

    Args:
        loader: of the validation or the test phase.
        parts: the split's datasets up to and including the loader's own; their items count as met.
        seed: of the candidates alone.
        exclude_history: no item that the user has met is among them.
        setting: that asks for them.

    Returns:
        whether what each user has met is left out; not where candidates that are drawn or given
        were there before.

    Raises:
        UserError: a user has too few items left for the number of negatives that RecBole's mode
            asks for.
    """
    if isinstance(loader, FullSortEvalDataLoader):
        if exclude_history and not isinstance(loader.collate_fn, WithoutMet):
            loader.collate_fn = WithoutMet(loader, items_of_met_titles(parts, catalogue))
        return exclude_history
    if not samples_candidates(loader) or isinstance(loader._sampler, FrozenCandidates):
        return False
    dataset, phase, args = loader._dataset, loader._sampler.phase, loader.neg_sample_args
    # In one order, whatever that of the rows: it is another for each kind of model, and what is
    # drawn for a pair depends on its place.
    user, target = np.divmod(np.unique(_pairs(dataset)), dataset.item_num)
    met = users, items = met_items(*parts)
    # Of the others each kind of model may have other events here.
    alike = asked_alike(dataset, phase)[users]
    sampler = NegativeSampler(
        PopulationSampler(
            items[alike] if alike.any() else items, dataset.item_num, args["distribution"]
        ),
        catalogue,
        met if exclude_history else (user, target),
        f"{setting}={loader.config['eval_args']['mode'][phase]!r}",
        dataset.field2id_token[dataset.uid_field],
    )
    with recbole_draws(seed, "candidates", phase):
        loader._sampler = FrozenCandidates(
            phase, user, target, sampler.draw(user, target, args["sample_num"])
        )
    return exclude_history


def share_met_before(parts: Sequence[Dataset]) -> float:
    """The share of the last part's targets that their user has met in the parts before it."""
    *before, own = parts
    users, items = met_items(*before)
    again = np.isin(_pairs(own), users * own.item_num + items)
    return float(again.mean()) if len(again) else 0.0


def listed(loader: AbstractDataLoader, lists: CandidateLists, file: str) -> AbstractDataLoader:
    """``loader``, which must not be frozen yet, with those of its targets that have a list.

    Args:
        lists: of the loader's phase, in RecBole's ids.
        file: that gives them, for messages.

    Raises:
        UserError: no target has a list.
    """
    dataset, phase = loader._dataset, loader._sampler.phase
    wanted, given = _pairs(dataset), _pairs_of(dataset, lists)
    has, serves = np.isin(wanted, given), np.isin(given, wanted)
    said = []
    for what, fits, pairs in (
        (f"{phase} targets have no list", has, wanted),
        (f"lists are of no {phase} target", serves, given),
    ):
        if not fits.all():
            first = _named(dataset, int(pairs[~fits][0]))
            said.append(f"{(~fits).sum():,} of {len(fits):,} {what}, the first of {first}")
    if not has.any():
        raise UserError(
            f"candidates_file={file!r}: {'; '.join(said)}; it must have lists of this split's "
            "targets."
        )
    if said:
        getLogger().warning(f"candidates_file={file!r}: {'; '.join(said)}; these are left out.")
    if has.all():
        return loader
    rows = dataset.copy(dataset.inter_feat[np.flatnonzero(has)])
    return type(loader)(loader.config, rows, loader._sampler, shuffle=False)


def with_lists(loader: AbstractDataLoader, lists: CandidateLists) -> AbstractDataLoader:
    """A loader of the same targets as ``loader``, each frozen among the candidates of its list,
    which it must have."""
    dataset, given = loader._dataset, _pairs_of(loader._dataset, lists)
    order, pairs = np.argsort(given), np.unique(_pairs(dataset))
    own = lists.take(order[np.searchsorted(given, pairs, sorter=order)])
    user, target = np.divmod(pairs, dataset.item_num)
    loader = with_mode(loader, f"uni{own.items.shape[1] - 1}")
    place = (own.items == own.target[:, None]).argmax(1)
    loader._sampler = FrozenCandidates(loader._sampler.phase, user, target, own.negatives, place)
    return loader


def _pairs(dataset: Dataset) -> np.ndarray:
    """User and target of each row as one number, int64 ``[rows]``."""
    user, target = users_and_targets(dataset)
    return user * dataset.item_num + target


def _pairs_of(dataset: Dataset, lists: CandidateLists) -> np.ndarray:
    return lists.user.astype(np.int64) * dataset.item_num + lists.target


def _named(dataset: Dataset, pair: int) -> str:
    user, item = divmod(pair, dataset.item_num)
    return (
        f"user {str(dataset.field2id_token[dataset.uid_field][user])!r} and item "
        f"{str(dataset.field2id_token[dataset.iid_field][item])!r}"
    )


class TargetEvalDataLoader(NegSampleEvalDataLoader):
    """RecBole's loader, but that each target is ranked on its own.

    RecBole ranks a user's targets together, against each other and the negatives of all, whatever
    history each has.
    """

    def _init_batch_size_and_step(self) -> None:
        # RecBole has grouped the rows by user before it calls this; here each row is a group.
        if samples_candidates(self):
            self.sample_size = len(self._dataset)
            self.uid_list = np.arange(self.sample_size)
            self.uid2index = [slice(row, row + 1) for row in self.uid_list]
            self.uid2items_num = np.ones(self.sample_size, np.int64)
        super()._init_batch_size_and_step()


def _asked(dataset: Dataset, phase: str) -> np.ndarray:
    """The rows of users with events enough, int64; says how many there are besides.

    Raises:
        UserError: there is none.
    """
    users, _ = users_and_targets(dataset)
    asked = np.flatnonzero(asked_alike(dataset, phase)[users])
    few = (
        f"of users with fewer than {FEWEST_EVENTS[phase]} events, of whom a model that knows no "
        "sequence would have other targets than one that does"
    )
    if len(users) and not len(asked):
        raise UserError(
            f"dataset={dataset.dataset_name!r}: all {phase} targets are {few}; give more events of "
            "a user."
        )
    if len(asked) < len(users):
        getLogger().warning(
            f"{len(users) - len(asked):,} of {len(users):,} {phase} targets are left out: they are "
            f"{few}."
        )
    return asked


def evaluation_loader(
    loader: AbstractDataLoader, phase: str, limit: int | None, seed: int
) -> AbstractDataLoader:
    """RecBole's loader, which must not be frozen yet, with each target ranked on its own, and with
    ``limit`` of the targets; without those of users with too few events to have the same targets
    under every kind of model.

    Args:
        phase: ``valid`` or ``test``.
        seed: by which the targets are drawn, the same ones for every model that has the same
            targets.

    Raises:
        UserError: no user has events enough.
    """
    dataset, rows = loader._dataset, loader._dataset.inter_feat
    asked = _asked(dataset, phase)
    if limit is not None and limit < len(asked):
        # By who is asked for what, in the data's own ids: the order of the rows is another for each
        # kind of model, and one may lack a user.
        user, item = (
            dataset.field2id_token[field][rows[field].numpy()[asked]]
            for field in (dataset.uid_field, dataset.iid_field)
        )
        salt = derive_seed(seed, "evaluation targets", phase)
        lots = [
            hashlib.sha256(f"{salt}\t{u}\t{i}".encode()).digest()
            for u, i in zip(user, item, strict=True)
        ]
        drawn = sorted(range(len(asked)), key=lots.__getitem__)[:limit]
        asked = asked[np.sort(drawn)]
    if len(asked) < len(rows):
        dataset = dataset.copy(rows[asked])
    kind = type(loader)
    if isinstance(loader, FullSortEvalDataLoader):
        kind = CatalogueEvalDataLoader
    elif samples_candidates(loader):
        kind = TargetEvalDataLoader
    elif dataset is loader._dataset:
        return loader
    return kind(loader.config, dataset, loader._sampler, shuffle=False)


def with_mode(loader: AbstractDataLoader, mode: str) -> AbstractDataLoader:
    """A loader of the same targets as ``loader``, which must not be frozen yet, for another
    evaluation mode, such as ``pop19``."""
    # The copy shares its dictionaries with the first loader's configuration, which must stay as it
    # is: what changes is put in place of them, and not into them.
    config = copy.copy(loader.config)
    args = config["eval_args"] | {"mode": {"valid": mode, "test": mode}}
    config.final_config_dict = config.final_config_dict | {"eval_args": args}
    for phase in ("valid", "test"):
        config._set_eval_neg_sample_args(phase)
    kind = CatalogueEvalDataLoader if mode == "full" else TargetEvalDataLoader
    return kind(config, loader._dataset, loader._sampler, shuffle=False)


def candidates_seed(config: Config) -> int:
    """By which all that every model meets alike is drawn: the setting of that name, or else that of
    the run."""
    seed = config["candidates_seed"]
    return config["seed"] if seed is None else seed


def samples_candidates(loader: AbstractDataLoader) -> bool:
    """Does this loader rank a target among sampled items (and not among all)?"""
    return (
        isinstance(loader, NegSampleDataLoader) and loader.neg_sample_args["sample_num"] != "none"
    )


def fingerprint(*loaders: AbstractDataLoader) -> str:
    """sha256 over who is asked for what against what, in the data's own ids: equal for equal
    candidates.

    A loader that ranks the whole catalogue counts with all its items, and with what it leaves out.
    """
    digest = hashlib.sha256()
    for number, loader in enumerate(loaders):
        dataset = loader._dataset
        if isinstance(loader._sampler, FrozenCandidates):
            frozen = loader._sampler
            user, items = (
                frozen.user,
                np.concatenate([frozen.target[:, None], frozen.negatives], axis=1),
            )
        else:
            user, target = users_and_targets(dataset)
            items = target[:, None]
        user_token, item_token = (
            dataset.field2id_token[dataset.uid_field],
            dataset.field2id_token[dataset.iid_field],
        )
        # its candidates are all items that there are, less some
        if isinstance(loader, FullSortEvalDataLoader):
            digest.update("\n".join(sorted(item_token[1:])).encode())
        if isinstance(loader.collate_fn, WithoutMet):
            out = loader.collate_fn.left_out(user, items[:, 0])
            items = [
                [target, *sorted(out[row], key=item_token.__getitem__)]
                for row, (target,) in enumerate(items)
            ]
        lines = sorted(
            "\t".join([str(number), user_token[u], *item_token[row]])
            for u, row in zip(user, items, strict=True)
        )
        digest.update("\n".join(lines).encode())
    return digest.hexdigest()
