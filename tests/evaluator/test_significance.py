"""The tests against their definitions, written out."""

from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recbole_sdpo.evaluator.significance import holm, paired_difference


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60))
def test_one_seed_of_hits_takes_mcnemars_exact_test(pairs):
    first, second = np.array(pairs, float).T
    won, lost = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    tail = sum(comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    found = paired_difference(first[None], second[None])
    assert found.p == pytest.approx(min(1, 2 * tail)) and found.mean == pytest.approx(
        (won - lost) / len(pairs)
    )
    alike = won == len(pairs) or lost == len(pairs)
    assert np.isnan(found.low) if alike else found.low <= found.mean <= found.high


def test_several_seeds_of_hits_flip_signs():
    """With two equal seeds, the flips are those of McNemar's test."""
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 2, (2, 1, 60)).astype(float)
    exact = paired_difference(first, second)
    flipped = paired_difference(np.repeat(first, 2, 0), np.repeat(second, 2, 0))
    assert exact.test == "McNemar, exact" and flipped.test == "sign flips"
    assert flipped.p == pytest.approx(exact.p, abs=0.02)
    few = paired_difference(np.array([[1, 1, 1, 0.0], [1, 1, 1, 0]]), np.zeros((2, 4)))
    # three users, all of one sign: two of eight sign patterns are as far out
    assert few.p == pytest.approx(2 / 2**3)


@pytest.mark.parametrize("users", [2, 3, 9])
def test_a_few_users_flip_signs_whatever_the_metric(users):
    """A t-test of equal differences would be sure of itself."""
    found = paired_difference(np.ones((1, users)), np.full((1, users), 0.5))
    assert found.test == "sign flips" and found.p == pytest.approx(2 / 2**users)
    assert np.isnan([found.low, found.high]).all()


def test_many_equal_differences_flip_signs_too():
    found = paired_difference(np.full((1, 40), 0.63), np.zeros((1, 40)))
    assert found.test == "sign flips" and 0 < found.p < 1e-6


def test_p_is_as_small_with_several_seeds_as_with_one():
    rng = np.random.default_rng(5)
    first, second = ((rng.random(1000) < share).astype(float)[None] for share in (0.5, 0.4))
    one = paired_difference(first, second)
    two = paired_difference(np.repeat(first, 2, 0), np.repeat(second, 2, 0))
    assert one.test == "McNemar, exact" and two.test == "sign flips"
    assert one.p < 2e-4 and np.log(two.p) == pytest.approx(np.log(one.p), rel=0.1)


def test_of_many_users_the_normal_distribution_gives_what_resampling_does(monkeypatch):
    rng = np.random.default_rng(6)
    first, second = (rng.integers(0, 3, (2, 3000)) < limit for limit in (2, 2))
    slow = paired_difference(first.astype(float), second.astype(float))
    monkeypatch.setattr("recbole_sdpo.evaluator.significance.MANY", 2999)
    fast = paired_difference(first.astype(float), second.astype(float))
    assert fast.test == slow.test == "sign flips"
    assert fast.p == pytest.approx(slow.p, abs=0.02)
    width = slow.high - slow.low
    assert abs(fast.low - slow.low) < width / 20 and abs(fast.high - slow.high) < width / 20


def test_one_user_alone_is_no_evidence():
    first = np.zeros((2, 5))
    first[:, 0] = 1
    assert paired_difference(first, np.zeros((2, 5))).p == 1


def test_other_metrics_take_a_paired_t_test_over_users():
    rng = np.random.default_rng(2)
    first, second = rng.random((3, 50)), rng.random((2, 50))
    difference = first.mean(0) - second.mean(0)
    t = difference.mean() / (difference.std(ddof=1) / sqrt(50))
    found = paired_difference(first, second)
    assert found.test == "paired t-test" and found.p == pytest.approx(2 * stats.t.sf(abs(t), 49))
    assert found == paired_difference(first, second), "the resampling has a seed"
    spread = 1.96 * difference.std() / sqrt(50)
    assert found.low == pytest.approx(difference.mean() - spread, abs=0.15 * spread)
    assert found.high == pytest.approx(difference.mean() + spread, abs=0.15 * spread)


def test_equal_models_do_not_differ():
    same = np.ones((1, 5)) / 3
    found = paired_difference(same, same)
    assert (found.mean, found.p, found.low, found.high) == (0, 1, 0, 0)


def test_other_users_are_refused():
    with pytest.raises(ValueError, match="5 users cannot be paired with 4"):
        paired_difference(np.ones((1, 5)), np.ones((1, 4)))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_as_its_step_down_procedure_does(p):
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.3):
        rejected, left = set(), sorted(range(len(p)), key=lambda i: p[i])
        # from the smallest on, until the first that is not rejected
        for step, number in enumerate(left):
            if p[number] * (len(p) - step) >= level:
                break
            rejected.add(number)
        assert {i for i in range(len(p)) if adjusted[i] < level} == rejected
