"""Do candidate lists give their targets away? Guessers that see no history and no model, tested
against chance and against what popularity explains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from scipy import optimize, sparse, stats
from scipy.special import logsumexp

from recbole_sdpo.data.candidates import FrozenCandidates
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.negatives import repeats
from recbole_sdpo.evaluator.significance import LEVEL, holm, interval
from recbole_sdpo.random import generator

ENOUGH = 60
"""Lists below which p-values and intervals, normal approximations, are rough."""

NOTABLE = 0.02
"""Of HR@1: a guesser that is less above what popularity explains is not warned of, for the model of
popularity is not exact, and with many lists everything is significant."""

MOST_LISTS, MOST_PAIRS, MOST_LEARNED = 100_000, 200_000_000, 4_000_000
"""Lists that are guessed, pairs of candidates of one of them, and candidates of the lists that are
learned from; of more, so many lists are drawn."""

FELLOWS = 100
"""Candidates of a list that are looked for in others; of more, so many are drawn for each list."""

MOST_FITTED = 20_000
"""Lists by which it is estimated what popularity explains."""

PAIRS_AT_ONCE = 800_000
"""Pairs of candidates of one list that are compared at a time, those of a whole list at least."""

BINS = 8
"""Groups of items, from the least popular to the most, within which one is as likely to be the
target as another."""

REDRAWN = 3
"""Times that the negatives of a list are drawn anew."""

TOP = 5

FLOOR = "audit: {}"
"""A guesser's row in a table."""

POPULARITY, SHARE = "popularity", "share as target"
"""Guessers by what an item is, whatever the list."""

BY_POPULARITY = FLOOR.format(POPULARITY)
"""How the row of that guesser begins, which a run's own table has already."""


@dataclass(frozen=True)
class Lists:
    """Candidate lists as arrays.

    Attributes:
        target: int ``[L]``.
        items: int ``[L, C]``, the target among them once, in the order as published.
        ordered: does that order mean anything? It does not where the target is put first.
    """

    target: np.ndarray
    items: np.ndarray
    ordered: bool = True

    def __len__(self) -> int:
        return len(self.target)

    @property
    def own(self) -> np.ndarray:
        """Where the target is, bool ``[L, C]``."""
        return self.items == self.target[:, None]

    def take(self, rows: np.ndarray) -> Lists:
        """Some of the lists."""
        return replace(self, target=self.target[rows], items=self.items[rows])


@dataclass(frozen=True)
class Guess:
    """How well one guesser does.

    Attributes:
        guesser: its name.
        hit, ndcg: HR@1 and NDCG@5, each with the ends of its 95 % interval. Candidates that a
            guesser cannot tell apart share their ranks.
        p: of HR@1, one-sided, against chance, Holm-corrected over the guessers.
        explained: the HR@1 that is expected of it where nothing but popularity tells targets from
            negatives; None for popularity itself. For the share as target it is its HR@1 beside
            negatives that are drawn anew.
        p_beyond: one-sided, of being above that, Holm-corrected.
    """

    guesser: str
    hit: tuple[float, float, float]
    ndcg: tuple[float, float, float]
    p: float
    explained: float | None
    p_beyond: float | None

    @property
    def gives_away(self) -> bool:
        """Is it above what popularity explains, beyond chance and by more than a trifle?"""
        significant = self.p_beyond is not None and self.p_beyond < LEVEL
        return significant and self.hit[0] - (self.explained or 0) > NOTABLE


@dataclass(frozen=True)
class Audit:
    """What the guessers found.

    Attributes:
        lists: how many were guessed.
        reference: how many the guessers learned from.
        halves: the reference is the other half of the lists, for want of other parts.
        chance: HR@1 and NDCG@5 of guessing blindly.
        knows_popularity: popularity is known, and not only how often an item is a target.
    """

    lists: int
    reference: int
    halves: bool
    chance: tuple[float, float]
    knows_popularity: bool
    guesses: list[Guess]

    def to_json(self) -> dict[str, Any]:
        """As ``result.json`` has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Audit:
        """What :meth:`to_json` gave."""
        return cls(**{**found, "guesses": [Guess(**guess) for guess in found["guesses"]]})

    def warnings(self, name: str) -> list[str]:
        """A sentence for each guesser that is above what popularity explains; ``name`` is that of
        the lists."""
        by = "popularity" if self.knows_popularity else "how often items are targets"
        return [
            f"candidates {name}: a guesser by {guess.guesser} has HR@1 {guess.hit[0]:.3f}, where "
            f"{by} explains {guess.explained:.3f} (p {in_words(guess.p_beyond, '= ')}); the "
            "lists give targets away without a model."
            for guess in self.guesses
            if guess.gives_away
        ]


def in_words(p: float | None, equals: str = "") -> str:
    """A p-value in two digits; those that are tiny are not told apart."""
    return "< 1e-16" if p is not None and p < 1e-16 else f"{equals}{p:.2g}"


def floor_rows(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Rows of a table, with RecBole's names of metrics, of what :meth:`Audit.to_json` wrote.

    How many lists were guessed stands in their names: it may be half of what a model is tested on.
    """
    return {
        FLOOR.format(f"{guess['guesser']} ({found['lists']:,} lists)"): {
            "hit@1": guess["hit"][0],
            f"ndcg@{TOP}": guess["ndcg"][0],
        }
        for guess in found["guesses"]
    }


def audit(
    lists: Lists,
    reference: Lists | None = None,
    popularity: np.ndarray | None = None,
    title_length: np.ndarray | None = None,
) -> Audit:
    """Let each guesser guess the targets of ``lists``.

    What a guesser knows it has learned from ``reference``, never from a list that it guesses. So
    under the hypothesis that a target is exchangeable with its negatives, lists are independent of
    each other given what was learned, and the tests hold.

    Where nothing but popularity tells targets from negatives, a candidate c of a list is the target
    with a probability in proportion to p(c) / q(c): how often an item is chosen, over how often it
    is drawn. A conditional logit over an item's popularity and its share as a target in
    ``reference`` estimates it. What it expects of a guesser is what popularity explains.

    The share itself guesses again among negatives that are drawn anew for each target, as often as
    items of their popularity are drawn. What has become popular since then explains as much there;
    that targets, or some of them, are seldom drawn as negatives does not.

    Args:
        lists: two or more.
        reference: of the validation and training parts; None: one half of ``lists`` is the
            reference for the other.
        popularity: float or int ``[items]``, interactions in training, if known.
        title_length: int ``[items]``, letters, if titles are known.
    """
    halves, rng = reference is None or not len(reference), generator(0, "audit")
    if halves:
        order = rng.permutation(len(lists))
        reference, lists = (
            lists.take(np.sort(half)) for half in np.split(order, [len(lists) // 2])
        )
    assert reference is not None
    each = lists.items.shape[1]
    lists = _some(lists, min(MOST_LISTS, max(2, MOST_PAIRS // each**2)), rng)
    reference = _some(reference, max(2, MOST_LEARNED // each), rng)
    scores = _scores(lists, reference, popularity, title_length, rng)
    anew = _drawn_anew(lists, reference, popularity, rng)
    hit, ndcg = _gains(np.zeros((1, each)))
    return Audit(
        lists=len(lists),
        reference=len(reference),
        halves=halves,
        chance=(float(hit[0, 0]), float(ndcg[0, 0])),
        knows_popularity=popularity is not None,
        guesses=_judged(lists, scores, _learned(reference, anew.items, reference.items)),
    )


def audit_loaders(
    loaders: tuple[AbstractDataLoader, AbstractDataLoader],
    popularity: np.ndarray,
    catalogue: Catalogue,
) -> Audit | None:
    """The audit of a run's frozen candidates for the test, learned from those for the validation;
    None where all items are candidates, or there is one target.

    The places of the candidates count where a file gives the lists. Lists that a file gives are not
    compared with others that are drawn.
    """
    valid, test = (loader._sampler for loader in loaders)
    if not isinstance(test, FrozenCandidates) or len(test.target) < 2:
        return None
    ordered, reference = test.place is not None, None
    if isinstance(valid, FrozenCandidates) and (valid.place is not None) == ordered:
        reference = Lists(valid.target, valid.lists(), ordered)
    titled = len(catalogue.untitled) + 1 < len(catalogue.titles)
    lengths = np.array([len(title) for title in catalogue.titles]) if titled else None
    return audit(Lists(test.target, test.lists(), ordered), reference, popularity, lengths)


def _some(lists: Lists, most: int, rng: np.random.Generator) -> Lists:
    if len(lists) <= most:
        return lists
    return lists.take(np.sort(rng.choice(len(lists), most, replace=False)))


def _scores(
    lists: Lists,
    reference: Lists,
    popularity: np.ndarray | None,
    title_length: np.ndarray | None,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """A score for each candidate, ``[L, C]``, by each guesser that can guess."""
    scores = {}
    if popularity is not None:
        scores[POPULARITY] = popularity[lists.items]
    if lists.ordered and reference.ordered:
        places = [
            np.broadcast_to(np.arange(each.items.shape[1]), each.items.shape)
            for each in (lists, reference)
        ]
        scores["position"] = _learned(reference, *places)
    scores[SHARE] = _learned(reference, lists.items, reference.items)
    scores["nearest lists"] = _nearest(lists, reference, rng)
    if title_length is not None:
        lengths = title_length[reference.items]
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 11)[1:-1]))
        groups = [np.searchsorted(edges, title_length[each.items]) for each in (lists, reference)]
        scores["title length"] = _learned(reference, *groups)
    return scores


def _learned(reference: Lists, groups: np.ndarray, of_reference: np.ndarray) -> np.ndarray:
    """For each candidate the share of targets among the candidates of its group in ``reference``;
    that of a group which is rare there is near 1 / C.

    Args:
        groups: int ``[L, C]``, the group of each candidate of the lists that are guessed.
        of_reference: int, the same for ``reference``.
    """
    number = 1 + max(int(groups.max()), int(of_reference.max()))
    seen = np.bincount(of_reference.reshape(-1), minlength=number)
    hits = np.bincount(of_reference[reference.own], minlength=number)
    return ((hits + 1) / (seen + groups.shape[1]))[groups]


def _nearest(lists: Lists, reference: Lists, rng: np.random.Generator) -> np.ndarray:
    """For each candidate how many of its list's candidates, or of :data:`FELLOWS` of them, the
    reference lists hold on average of which it is the target; 0 where there is none.

    Lists drawn after ``random.seed(target)`` share all their negatives with those of the same
    target, wherever these are; others share as many as chance will.

        reference lists    target a: {a b c d}   target b: {b d e f}   target b: {b a e f}
        list {a b e f}     a: 2                  b: (3 + 4) / 2 = 3.5  e, f: 0
    """
    used, places = np.unique(
        np.concatenate([lists.items.reshape(-1), reference.items.reshape(-1)]), return_inverse=True
    )
    own, theirs = places[: lists.items.size], places[lists.items.size :]
    items, others = own.reshape(lists.items.shape), theirs.reshape(reference.items.shape)
    target, size = others[reference.own], len(used)
    times = np.bincount(target, minlength=size)
    pairs = np.repeat(target, others.shape[1]), others.reshape(-1)
    together = sparse.csr_array((np.ones(others.size, np.float32), pairs), shape=(size, size))
    together.sum_duplicates()
    together.sort_indices()
    scores = np.zeros(items.shape)
    for rows in _blocks(*items.shape):
        some = items[rows]
        row, place = np.nonzero(times[some])  # the others have no list
        if not len(row):
            continue
        # Drawn without a look at the places, for the target may have one of its own.
        drawn = rng.permuted(some, axis=1)[:, :FELLOWS] if some.shape[1] > FELLOWS else some
        candidate, fellows = some[row, place], drawn[row]
        held = together[np.repeat(candidate, fellows.shape[1]), fellows.reshape(-1)]
        overlap = np.asarray(held).reshape(fellows.shape).sum(1)
        scores[rows.start + row, place] = overlap / times[candidate]
    return scores


def _blocks(lists: int, each: int) -> Iterator[slice]:
    """All ``lists``, so many at a time as their pairs of candidates allow."""
    step = max(1, PAIRS_AT_ONCE // each**2)
    for begin in range(0, lists, step):
        yield slice(begin, begin + step)


def _gains(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HR@1 and NDCG@5 of each candidate as if it were the target, float64 ``[L, C]``; candidates of
    one score share their ranks."""
    each = scores.shape[1]
    ndcg = np.where(np.arange(each) < TOP, 1 / np.log2(np.arange(each) + 2), 0.0)
    up_to = np.concatenate([[0.0], np.cumsum(ndcg)])
    higher, alike = np.empty(scores.shape, np.int64), np.empty(scores.shape, np.int64)
    for rows in _blocks(*scores.shape):
        mine, theirs = scores[rows, :, None], scores[rows, None, :]
        higher[rows], alike[rows] = (theirs > mine).sum(2), (theirs == mine).sum(2)
    return (higher == 0) / alike, (up_to[higher + alike] - up_to[higher]) / alike


def _drawn_anew(
    lists: Lists, reference: Lists, popularity: np.ndarray | None, rng: np.random.Generator
) -> Lists:
    """:data:`REDRAWN` lists for each one, of the same target, first, and other negatives.

    An item is drawn as often as items of its popularity are in ``lists`` and ``reference``: with a
    chance whose logarithm is a cubic of that of the popularity. Where no popularity is known, all
    items of the lists are drawn alike.
    """
    every = [lists.items.reshape(-1), reference.items.reshape(-1)]
    pool, times = np.unique(np.concatenate(every), return_counts=True)
    for each in (lists, reference):
        np.subtract.at(times, np.searchsorted(pool, each.target), 1)
    log = np.zeros(len(pool)) if popularity is None else np.log1p(popularity[pool])
    log = (log - log.mean()) / max(float(log.std()), 1e-9)
    powers = log[:, None] ** np.arange(1, 4)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        log_p = powers @ weights - logsumexp(powers @ weights)
        gradient = times.sum() * np.exp(log_p) @ powers - times @ powers
        return -(times @ log_p) / times.sum(), gradient / times.sum()

    weights = optimize.minimize(loss, np.zeros(3), jac=True, method="L-BFGS-B").x
    chance = np.exp(powers @ weights)
    target = np.tile(lists.target, REDRAWN)
    if len(pool) < 2 * lists.items.shape[1]:  # nearly all are drawn: all are put in an order
        keys = np.log(rng.random((len(target), len(pool)))) / chance
        keys[np.arange(len(target)), np.searchsorted(pool, target)] = 1
        first = np.argsort(-keys, axis=1)[:, : lists.items.shape[1]]
        return Lists(target, pool[first], ordered=False)
    up_to = chance.cumsum()
    items = np.repeat(target[:, None], lists.items.shape[1], axis=1)
    todo = np.arange(len(items))
    while len(todo):
        some = items[todo]
        again = repeats(some)
        some[again] = pool[np.searchsorted(up_to, up_to[-1] * rng.random(int(again.sum())))]
        items[todo] = some
        todo = todo[repeats(some).any(1)]
    return Lists(target, items, ordered=False)


def _judged(lists: Lists, scores: dict[str, np.ndarray], anew: np.ndarray) -> list[Guess]:
    """Each guesser's metrics and tests.

    Args:
        anew: the share as target in lists drawn anew, ``[REDRAWN * L, C]``, the target's first.
    """
    own, even = lists.own, np.full(lists.items.shape, 1 / lists.items.shape[1])
    of_items = [scores[name] for name in (POPULARITY, SHARE) if name in scores]
    model = _explained(of_items, own)
    guesses, against_chance, beyond = [], [], {}
    for name, score in scores.items():
        hit, ndcg = _gains(score)
        explained = None
        if name == SHARE:
            elsewhere = _gains(anew)[0][:, 0].reshape(REDRAWN, -1).mean(0)
            beyond[name], explained = _above_paired(hit[own], elsewhere)
        elif name != POPULARITY:
            beyond[name], explained = _above(hit, own, model)
        against_chance.append(_above(hit, own, even)[0])
        guesses.append(Guess(name, _interval(hit[own]), _interval(ndcg[own]), 1.0, explained, None))
    p_beyond = dict(zip(beyond, map(float, holm(list(beyond.values()))), strict=True))
    return [
        replace(guess, p=float(p), p_beyond=p_beyond.get(guess.guesser))
        for guess, p in zip(guesses, holm(against_chance), strict=True)
    ]


def _explained(kinds: Sequence[np.ndarray], own: np.ndarray) -> np.ndarray:
    """The probability of each candidate to be the target by its scores, float64 ``[L, C]``: a
    conditional logit, for each kind of score with a slope on its logarithm and a weight for each
    group of it.

    Args:
        kinds: scores, 0 or more, ``[L, C]``.
    """
    values, columns, size = [], [], len(kinds)
    for score in kinds:
        value = np.log(score + score[score > 0].min(initial=1.0))
        values.append((value - value.mean()) / max(float(value.std()), 1e-9))
        edges = np.unique(np.quantile(score, np.linspace(0, 1, BINS + 1)[1:-1]))
        columns.append(size + np.searchsorted(edges, score))
        size += len(edges) + 1
    some = np.linspace(0, len(own) - 1, min(len(own), MOST_FITTED)).astype(np.int64)
    fitted, features, groups = own[some], [of[some] for of in values], [of[some] for of in columns]
    hits = np.zeros(size)
    for of in groups:
        hits += np.bincount(of[fitted], minlength=size)
    hits[: len(kinds)] = [value[fitted].sum() for value in features]

    def log_p(
        weights: np.ndarray, features: list[np.ndarray], groups: list[np.ndarray]
    ) -> np.ndarray:
        slopes = zip(weights, features)  # which are the first weights
        utility = sum(weights[of] for of in groups) + sum(slope * of for slope, of in slopes)
        return utility - logsumexp(utility, axis=1, keepdims=True)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        log = log_p(weights, features, groups)
        p = np.exp(log)
        expected = np.zeros(size)
        for of in groups:
            expected += np.bincount(of.reshape(-1), weights=p.reshape(-1), minlength=size)
        expected[: len(kinds)] = [(p * value).sum() for value in features]
        # a ridge keeps the weight of a group without targets finite
        value = weights @ weights / 2 - log[fitted].sum()
        return value / len(some), (weights + expected - hits) / len(some)

    best = optimize.minimize(loss, np.zeros(size), jac=True, method="L-BFGS-B")
    return np.exp(log_p(best.x, values, columns))


def _above(hit: np.ndarray, own: np.ndarray, p: np.ndarray) -> tuple[float, float]:
    """The one-sided p-value of as many hits or more where the target of each list is drawn by
    ``p [L, C]``, by the normal approximation with a correction for continuity; and the HR@1 that is
    expected then."""
    mean = (p * hit).sum(1)
    spread = np.sqrt(((p * hit**2).sum(1) - mean**2).clip(min=0).sum())
    excess = hit[own].sum() - mean.sum() - 0.5
    return float(stats.norm.sf(excess / spread)) if spread > 1e-9 else 1.0, float(mean.mean())


def _above_paired(hit: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The one-sided p-value of a mean above that of ``other`` on the same lists, and that mean.

    By the normal approximation with a correction for continuity. Of few lists, all may differ
    alike: the variance is that of a hit by the other's mean, at least.
    """
    difference, mean = hit - other, float(other.mean())
    spread = np.sqrt(len(hit) * max(float(difference.var()), mean * (1 - mean)))
    excess = difference.sum() - 0.5
    return float(stats.norm.sf(excess / spread)) if spread > 1e-9 else 1.0, mean


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval; itself where all lists have one value, as where
    a guesser cannot tell their candidates apart."""
    mean, (low, high) = float(values.mean()), interval(values)
    return (mean, mean, mean) if np.isnan(low) else (mean, low, high)
