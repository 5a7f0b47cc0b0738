"""Is one model better than another on the same users? Paired tests of users' metrics, by SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from recbole_sdpo.errors import UserError

LEVEL = 0.05
"""A difference is called significant where its corrected p-value is below this."""

RESAMPLES = 9999
"""Of the bootstrap, and of the sign flips that stand in for McNemar's test with several seeds."""

FEW, MANY = 10, 5_000
"""Users below which a t-test cannot be relied on, and above which resampling gives what the normal
distribution gives at once."""


class Difference(NamedTuple):
    """A paired difference of means over users.

    Attributes:
        mean: first model less second.
        low, high: its 95 % confidence interval by the percentile bootstrap over users, or for
            :data:`MANY` of them by the normal distribution; not a number where no two users'
            differences differ, but for differences of 0, for their spread is not known then.
        p: two-sided, of no difference.
        test: the test that gave it.
    """

    mean: float
    low: float
    high: float
    p: float
    test: str


def interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean of users' ``values``, at 95 %: Wilson's where they are 0 or 1, else Student's t
    within 0 and 1; not a number where they do not differ, for their spread is not known then."""
    if len(values) and np.isin(values, (0, 1)).all():
        counted = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return float(counted.low), float(counted.high)
    if len(np.unique(values)) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    low, high = np.clip([values.mean() - half, values.mean() + half], 0, 1)
    return float(low), float(high)


def paired_difference(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Difference:
    """Compare two models by a metric of the same users in the same order.

    A metric that is 0 or 1 is tested by McNemar's exact test. With several seeds a user's mean is
    neither, and the same hypothesis, that a user's difference is as likely to have the other sign,
    is tested by random sign flips. Any other metric takes a paired t-test, but for a few users, or
    equal differences, sign flips. Seeds are averaged within each user first: users are what was
    sampled.

    Args:
        first, second: float64 ``[seeds, users]``; the numbers of seeds may differ.
        seed: of the resampling.

    Raises:
        UserError: the users differ in number.
    """
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"{first.shape[1]} users cannot be paired with {second.shape[1]}; "
            "compare runs on the same candidates."
        )
    difference = first.mean(0) - second.mean(0)
    rng = np.random.default_rng(seed)
    low, high = _interval(difference, rng)
    test, p = _test(first, second, difference, rng)
    return Difference(float(difference.mean()), low, high, p, test)


def _interval(difference: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    if len(np.unique(difference)) < 2:
        known = 0.0 if not difference.any() else float("nan")
        return known, known
    if len(difference) > MANY:
        half = stats.norm.ppf(0.975) * stats.sem(difference)
        return float(difference.mean() - half), float(difference.mean() + half)
    ends = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=500,
        method="percentile",
        random_state=rng,
    ).confidence_interval
    return float(ends.low), float(ends.high)


def _test(
    first: np.ndarray, second: np.ndarray, difference: np.ndarray, rng: np.random.Generator
) -> tuple[str, float]:
    if not difference.any():
        return "none", 1.0
    binary = np.isin(np.concatenate([first, second]), (0, 1)).all()
    if not binary and len(difference) >= FEW and len(np.unique(difference)) > 1:
        return "paired t-test", float(stats.ttest_1samp(difference, 0).pvalue)
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    if binary and len(first) == len(second) == 1:
        return "McNemar, exact", float(stats.binomtest(won, won + lost).pvalue)
    return "sign flips", _by_flips(difference[difference != 0], rng)


def _by_flips(difference: np.ndarray, rng: np.random.Generator) -> float:
    """p of a sum that is so far from 0, where each of its terms may have the other sign."""
    if len(difference) == 1:
        return 1.0  # of two sign patterns both are as far out; SciPy wants more users
    # By the central limit theorem, which holds far out where resampling has seen nothing.
    limit = 2 * stats.norm.sf(abs(difference.sum()) / np.sqrt(np.square(difference).sum()))
    if len(difference) > MANY:
        return float(limit)
    flipped = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=500,
        random_state=rng,
    )
    p, least = float(flipped.pvalue), 2 / (RESAMPLES + 1)
    exact = 2 ** len(difference) <= RESAMPLES
    return p if exact or p > least else min(p, float(limit))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's correction (1979): adjusted p-values, float64, which bound the chance of any false
    rejection among all of them."""
    raw = np.asarray(p, float)
    order = np.argsort(raw, kind="stable")
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(np.maximum.accumulate(raw[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted
