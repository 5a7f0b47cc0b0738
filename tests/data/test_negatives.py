"""Sources of negatives, and their shares."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.sampler.sampler import AbstractSampler

from recbole_sdpo.data import negatives
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.negatives import MixedNegatives, NegativeSampler, shares
from recbole_sdpo.errors import UserError
from recbole_sdpo.random import recbole_draws

TITLES = ("", *"abcdefgh", "a")  # items 1 and 9 are one title
CATALOGUE = Catalogue(TITLES, np.array([]))
MET = (np.array([1, 1, 2]), np.array([3, 1, 4]))


class Among:
    """A sampler of RecBole's, of the given items alone."""

    distribution = "popularity"

    def __init__(self, *items, seed=0):
        self.prob = dict.fromkeys(items, 1.0)
        self.rng = np.random.default_rng(seed)

    def sampling(self, number):
        return self.rng.choice([*self.prob], number)


def source(*items):
    return NegativeSampler(Among(*items), CATALOGUE, MET, "x", np.array(["", "u1", "u2"]))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 40))
def test_shares_are_whole_and_as_near_as_they_can_be(weights, number):
    weights = {str(place): float(weight) for place, weight in enumerate(weights)}
    each, total = shares(weights, number), sum(weights.values())
    assert sum(each.values()) == number and each.keys() == weights.keys()
    for name, weight in weights.items():
        exact = number * weight / total
        assert exact - 1 < each[name] < exact + 1
    # none that lost its fraction had a larger one than one that was rounded up
    left = {name: number * weight / total % 1 for name, weight in weights.items()}
    up = [left[name] for name in each if each[name] > number * weights[name] / total]
    down = [left[name] for name in each if each[name] <= number * weights[name] / total]
    assert not up or not down or min(up) >= max(down) - 1e-9


def test_each_source_gives_its_share_and_no_title_comes_twice():
    mixed = MixedNegatives(
        {"uniform": source(1, 2, 5, 6, 7), "popularity": source(2, 5, 8, 9)},
        {"uniform": 1, "popularity": 3},
        {"uniform": 1.0, "popularity": 1.0},
    )
    user, target = np.full(50, 2), np.full(50, 6)
    drawn = mixed.draw(user, target, 4)
    assert drawn.shape == (50, 4)
    assert {*drawn[:, 0]} <= {1, 2, 5, 7} and {*drawn[:, 1:].ravel()} == {2, 5, 8, 9}
    titles = CATALOGUE.group[drawn]
    assert all(len({*row}) == 4 for row in titles.tolist())


def test_what_a_prompt_shows_beyond_them_is_shared_by_weight():
    mixed = MixedNegatives(
        {"uniform": source(1, 2), "popularity": source(5, 6, 7, 8)},
        {"uniform": 1, "popularity": 1},
        {"uniform": 1.0, "popularity": 2.0},
    )
    (drawn,) = mixed.draw(np.array([2]), np.array([4]), 5)
    assert [{*part} <= {1, 2} for part in (drawn[:1], drawn[1:2], drawn[2:3], drawn[3:])] == [
        *(True, False, True, False)
    ]


def test_what_stands_beside_is_not_drawn_by_title():
    sampler = source(1, 2, 5, 6, 9)
    beside = np.array([[9, 2]])  # 9 is the title of 1
    drawn = [sampler.draw(np.array([2]), np.array([7]), 2, beside)[0] for _ in range(20)]
    assert all(sorted(row.tolist()) == [5, 6] for row in drawn)
    with pytest.raises(UserError, match="asks for 3 negatives .* only 2 may be drawn"):
        sampler.draw(np.array([2]), np.array([7]), 3, beside)


class Popular(AbstractSampler):
    """RecBole's sampler by popularity, of items that so many users met."""

    def __init__(self, times, alpha):
        self.times = times
        super().__init__("popularity", alpha)

    def get_used_ids(self):
        return None

    def _get_candidates_list(self):
        return [item for item, times in enumerate(self.times) for _ in range(times)]


@pytest.mark.parametrize("rounds", [0, 1000])
def test_what_the_sampler_hardly_proposes_is_drawn_as_it_would_be(monkeypatch, rounds):
    """By exact probabilities, which a walk over all orders finds, whether by proposals or not."""
    monkeypatch.setattr(negatives, "ROUNDS", rounds)
    times = [0, 4, 9, 1, 2, 6, 3, 5, 0, 2]  # of which 8 is never drawn, and 9 is the title of 1
    sampler = NegativeSampler(Popular(times, 1.5), CATALOGUE, MET, "x", np.array(["", "u1", "u2"]))
    p = {item: times[item] ** 1.5 for item in (1, 2, 3, 7, 9)}  # not 4, met; nor 5 and 6
    chance = Counter()
    for first, second in permutations(p, 2):
        if CATALOGUE.group[first] != CATALOGUE.group[second]:
            left = sum(p[i] for i in p if CATALOGUE.group[i] != CATALOGUE.group[first])
            chance[first, second] = p[first] / sum(p.values()) * p[second] / left
    number = 20_000
    with recbole_draws(1, "test"):
        drawn = sampler.draw(
            np.full(number, 2), np.full(number, 5), 2, beside=np.full((number, 1), 6)
        )
    seen = Counter(map(tuple, drawn.tolist()))
    assert seen.keys() <= chance.keys()
    for pair, expected in chance.items():
        error = (expected * (1 - expected) / number) ** 0.5
        assert abs(seen[pair] / number - expected) < 4.5 * error


def test_a_user_who_met_nearly_all_that_is_proposed_does_not_keep_the_sampler_busy():
    times = [0, *[1000] * 6, 1, 1, 0]
    met = np.full(6, 2), np.arange(1, 7)
    sampler = NegativeSampler(Popular(times, 6.0), CATALOGUE, met, "x", np.array(["", "u1", "u2"]))
    with recbole_draws(1, "test"):
        drawn = sampler.draw(np.full(3, 2), np.full(3, 1), 2)
    assert np.sort(drawn, 1).tolist() == [[7, 8]] * 3


def test_excluded_is_what_was_met_and_the_target():
    group = CATALOGUE.group
    user, target = np.array([2, 1, 0]), np.array([5, 9, 6])
    expected = Counter(
        [(0, group[4]), (0, group[5]), (1, group[3]), (1, group[1]), (1, group[9]), (2, group[6])]
    )
    for of in (
        source(1, 2),
        MixedNegatives({"a": source(1), "b": source(2)}, {"a": 1, "b": 1}, {"a": 1, "b": 1}),
    ):
        rows, titles = of.excluded(user, target)
        assert Counter(zip(rows.tolist(), titles.tolist(), strict=True)) == expected
