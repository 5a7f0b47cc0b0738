"""What a model without sequences may learn of rows that may be of one person."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recbole_sdpo.data.split_rows import SplitRows, known_events, unknown
from recbole_sdpo.ragged import Ragged


@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=5),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_no_event_is_learned_that_a_row_asks_for_and_all_others_are(lengths, longest, rng):
    """Persons, each with items of her own, and a row of each event; some rows are missing."""
    parts: list[list] = [[], [], []]
    asked, first = set(), 1
    for length in lengths:
        items = list(range(first, first + length))
        first += length
        for place in range(1, length):
            part = rng.choice([0, 1, 2, None])
            if part is not None:
                parts[part].append((items[max(0, place - longest) : place], items[place]))
            if part in (1, 2):
                asked.add(items[place])
    rng.shuffle(parts[1]), rng.shuffle(parts[2])
    rows, expected, user = [], set(), 0
    for number, part in enumerate(parts):
        users = np.arange(user, user := user + len(part))
        history, target = [row[0] for row in part], np.array([row[1] for row in part], np.int64)
        rows.append(SplitRows(users, Ragged.from_rows(history), target))
        for who, shown, item in zip(users, history, target, strict=True):
            learned = [*shown, item] if number == 0 else [it for it in shown if it not in asked]
            expected |= {(who, one) for one in learned}
    known = known_events(*rows)
    assert [*map(tuple, known.T)] == sorted(expected)
    strange = {who for part in rows[1:] for who in part.user} - {who for who, _ in expected}
    assert unknown(known, rows[1:]) == len(strange)
