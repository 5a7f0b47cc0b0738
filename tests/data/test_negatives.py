"""Sources of negatives, and their shares."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.negatives import MixedNegatives, NegativeSampler, shares
from recbole_sdpo.errors import UserError

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
    with pytest.raises(UserError, match="asks for 3 negatives .* only 2 are left"):
        sampler.draw(np.array([2]), np.array([7]), 3, beside)


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
