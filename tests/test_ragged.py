import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recbole_sdpo.ragged import Ragged, segment_sums

rows = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=6)


@given(rows, st.data())
def test_take_join_and_padded_do_what_lists_do(content, data):
    ragged = Ragged.from_rows(content)
    chosen = data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8))
    taken = ragged.take(np.array(chosen, int))
    assert [taken[i].tolist() for i in range(len(taken))] == [content[i] for i in chosen]
    half = len(content) // 2
    joined = ragged.join(np.array([half, 0, len(content) - half]))
    assert [joined[i].tolist() for i in range(3)] == [
        sum(content[:half], []),
        [],
        sum(content[half:], []),
    ]
    assert [[x for x in row if x >= 0] for row in ragged.padded(-1).tolist()] == content


@given(rows)
def test_segment_sums(content):
    ragged = Ragged.from_rows(content)
    assert segment_sums(ragged.values, ragged.lengths).tolist() == [sum(row) for row in content]


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            *[st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=n, max_size=n)] * 3
        )
    )
)
def test_beside_and_stack_are_concatenations(parts):
    ragged = [Ragged.from_rows(part) for part in parts]
    beside, stacked = ragged[0].beside(*ragged[1:]), Ragged.stack(ragged)
    assert [row.tolist() for row in map(beside.__getitem__, range(len(beside)))] == [
        a + b + c for a, b, c in zip(*parts)
    ]
    assert [row.tolist() for row in map(stacked.__getitem__, range(len(stacked)))] == sum(parts, [])
