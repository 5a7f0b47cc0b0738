"""The forest against its specification, :func:`slow_forest`, and against what it is for."""

import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from recbole_sdpo.lm import forest as module
from recbole_sdpo.lm.attention import _block_mask
from recbole_sdpo.lm.forest import Forest, cut_wide, plant
from recbole_sdpo.ragged import Ragged

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=7)


@st.composite
def batches(draw):
    """Trunks, and responses that start on them; of few distinct tokens, so that much is shared."""
    trunks = draw(st.lists(tokens, min_size=1, max_size=3))
    trees = draw(st.lists(st.integers(0, len(trunks) - 1), max_size=12))
    starts = [draw(st.integers(1, len(trunks[tree]))) for tree in trees]
    return trunks, trees, starts, [draw(tokens) for _ in trees]


def slow_forest(trunks, trees, starts, responses, multiple=1):
    """What ``plant`` is to give: a tree's distinct prefixes, each one token, depth-first.

    A response asks for each of its tokens after the prefix before it; so those before a token that
    is asked for, and all that they begin with, have a place. Children of a prefix come in the order
    of their last tokens, but the one that goes on along the trunk comes last.
    """
    asked = []  # (tree, prefix, token, response, step)
    for number, (tree, start, response) in enumerate(zip(trees, starts, responses, strict=True)):
        for step, token in enumerate(response):
            prefix = (*trunks[tree][:start], *response[:step])
            asked.append((tree, prefix, token, number, step))
    rows = [
        depth_first(trunk, [prefix for t, prefix, *_ in asked if t == tree])
        for tree, trunk in enumerate(trunks)
    ]
    width = -(-max(1, *map(len, rows)) // multiple) * multiple
    tokens, positions = np.zeros((2, len(trunks), width), np.int64)
    end = np.tile(1 + np.arange(width), (len(trunks), 1))
    for tree, row in enumerate(rows):
        for column, prefix in enumerate(row):
            tokens[tree, column], positions[tree, column] = prefix[-1], len(prefix) - 1
            end[tree, column] = column + sum(begins(other, prefix) for other in row)
    edges = [
        (tree * width + rows[tree].index(prefix), number, step, token)
        for tree, prefix, token, number, step in asked
    ]
    edges.sort()
    places = [place for place, *_ in edges]
    states = sorted(set(places))
    return Forest(
        *map(torch.from_numpy, (tokens, positions, end)),
        states=whole_numbers(states),
        edge_state=whole_numbers(map(states.index, places)),
        edge_token=whole_numbers(token for *_, token in edges),
        edge_response=whole_numbers(number for _, number, _, _ in edges),
        edge_step=whole_numbers(step for _, _, step, _ in edges),
        first_edge=np.array([*map(places.index, states), len(edges)]),
        steps=max(map(len, responses), default=0),
        responses=len(responses),
        chains=all(begins(trunk, prefix) for trunk, row in zip(trunks, rows) for prefix in row),
        size=sum(map(len, rows)),
    )


def depth_first(trunk, prefixes):
    every = {prefix[:length] for prefix in prefixes for length in range(1, len(prefix) + 1)}

    def below(prefix):
        children = [
            other for other in every if len(other) == len(prefix) + 1 and begins(other, prefix)
        ]
        children.sort(key=lambda child: (begins(trunk, child), child[-1]))
        return [node for child in children for node in (child, *below(child))]

    return below(())


def begins(sequence, prefix):
    return tuple(sequence[: len(prefix)]) == tuple(prefix)


def whole_numbers(values):
    return torch.tensor(list(values), dtype=torch.int64)


def planted(trunks, trees, starts, responses, *padding):
    rows = (
        Ragged.from_rows(trunks),
        np.array(trees, int),
        np.array(starts, int),
        Ragged.from_rows(responses),
    )
    return plant(*rows, *padding)


@settings(max_examples=300, deadline=None)
@given(batches(), st.sampled_from([1, 2, 16]))
def test_it_is_the_slow_one_to_the_bit(batch, multiple):
    found, expected = planted(*batch, multiple), slow_forest(*batch, multiple)
    for field in fields(Forest):
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype and mine.equal(theirs), field.name
        else:
            assert np.array_equal(mine, theirs) and type(mine) is type(theirs), field.name


def test_the_drawing_is_what_plant_gives():
    letters = "abcdpqrstxy"
    lines = [line.strip() for line in module.__doc__.splitlines()]
    head = next(
        number for number, line in enumerate(lines) if re.fullmatch(r"response +prompt", line)
    )
    columns = [
        re.match(r"(\w(?: \w)*) {2,}(\w(?: \w)*)(?:  |$)", line).groups()
        for line in lines[head + 1 : head + 5]
    ]
    responses, prompts = (
        [[letters.index(token) for token in text.split()] for text in column]
        for column in zip(*columns)
    )
    trunk = max(prompts, key=len)
    forest = planted([trunk], [0] * 4, [len(prompt) for prompt in prompts], responses)
    drawn = {
        name: line.split()[1:]
        for line in lines
        for name in ("token", "position", "end", "asked")
        if line.startswith(name + "  ")
    }
    assert [letters[token] for token in forest.tokens[0]] == drawn["token"]
    assert forest.positions[0].tolist() == [int(number) for number in drawn["position"]]
    assert forest.end[0].tolist() == [int(number) for number in drawn["end"]]
    asked = ["-"] * forest.tokens.shape[1]
    for place, first, last in zip(forest.states, forest.first_edge, forest.first_edge[1:]):
        asked[place] = "".join(letters[token] for token in forest.edge_token[first:last])
    assert asked == drawn["asked"]
    masks = [re.fullmatch(r"(?:sees +)?(\w)((?: +[#.])+)", line) for line in lines]
    shown = [(mask[1], mask[2].split()) for mask in masks if mask]
    assert [token for token, _ in shown] == drawn["token"]
    for row, (_, marks) in zip(forest.attention()[0].tolist(), shown, strict=True):
        assert ["#" if seen else "." for seen in row[: len(marks)]] == marks and not any(
            row[len(marks) :]
        )


@settings(max_examples=300, deadline=None)
@given(batches())
def test_every_response_sees_its_sequence_and_every_prefix_is_there_once(batch):
    trunks, trees, starts, responses = batch
    forest = planted(*batch)
    visible, width = forest.attention().numpy(), forest.tokens.shape[1]
    prefixes = set()
    for number, (tree, start, response) in enumerate(zip(trees, starts, responses, strict=True)):
        edges = np.flatnonzero(forest.edge_response.numpy() == number)
        edges = edges[np.argsort(forest.edge_step.numpy()[edges])]
        assert forest.edge_token[edges].tolist() == response
        sequence = trunks[tree][:start]
        for edge, token in zip(edges, response, strict=True):
            row, column = divmod(int(forest.states[forest.edge_state[edge]]), width)
            seen = np.flatnonzero(visible[row, column])
            assert row == tree
            assert forest.tokens[row, seen].tolist() == sequence
            assert forest.positions[row, seen].tolist() == list(range(len(sequence)))
            prefixes |= {(tree, *sequence[:n]) for n in range(1, len(sequence) + 1)}
            sequence = [*sequence, token]
    assert forest.size == len(prefixes)
    assert (np.diff(forest.edge_state) >= 0).all() and (np.diff(forest.states) > 0).all()
    counts = np.bincount(forest.edge_state, minlength=len(forest.states))
    assert forest.first_edge.tolist() == [0, *np.cumsum(counts)]
    table = forest.sum_by_response(torch.arange(1.0, 1 + len(forest.edge_token)))
    assert table.tolist() == [
        float((1 + np.flatnonzero(forest.edge_response == number)).sum())
        for number in range(len(trees))
    ]


def test_a_pinned_forest_is_the_same(monkeypatch):
    forest = plant(
        Ragged.from_rows([[3, 4, 5]]),
        np.array([0, 0]),
        np.array([2, 3]),
        Ragged.from_rows([[7, 8], [9]]),
    )
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: tensor + 0
    )  # there is no GPU to pin for
    pinned = forest.pin_memory()
    for field in fields(forest):
        old, new = getattr(forest, field.name), getattr(pinned, field.name)
        assert (old is not new and old.equal(new)) if isinstance(old, torch.Tensor) else old is new


def test_padding_sees_itself_and_nothing_real_sees_padding():
    forest = plant(
        Ragged.from_rows([[1, 2, 3, 4], [5]]),
        np.array([0, 1]),
        np.array([4, 1]),
        Ragged.from_rows([[6], [7]]),
    )
    visible = forest.attention().numpy()[1]
    assert visible[1:, 1:].sum() == 3 and np.diag(visible).all() and not visible[0, 1:].any()


def test_sliding_window_counts_depth_not_columns():
    forest = plant(
        Ragged.from_rows([[1, 2, 3]]),
        np.array([0, 0]),
        np.array([1, 3]),
        Ragged.from_rows([[8, 9, 9, 9], [7, 7]]),
    )
    visible = forest.attention(window=2).numpy()[0]
    assert all(
        (forest.positions[0, i] - forest.positions[0, np.flatnonzero(row)]).max() <= 1
        for i, row in enumerate(visible)
    )
    assert visible.sum(1).max() == 2


@pytest.mark.parametrize(
    ("start", "response", "message"),
    [
        (0, [1], "starts after 0 tokens"),
        (3, [1], "starts after 3 tokens of a trunk of 2"),
        (1, [], "has no token"),
    ],
)
def test_what_cannot_be_planted_is_refused(start, response, message):
    with pytest.raises(ValueError, match=message):
        plant(
            Ragged.from_rows([[1, 2]]),
            np.array([0]),
            np.array([start]),
            Ragged.from_rows([response]),
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_blocks_are_those_that_every_pair_would_give(seed):
    rng = np.random.default_rng(seed)
    trunks = [rng.integers(0, 9, rng.integers(1, 400)) for _ in range(rng.integers(1, 4))]
    tree = rng.integers(0, len(trunks), rng.integers(1, 60))
    start = np.array([rng.integers(1, len(trunks[t]) + 1) for t in tree])
    responses = [rng.integers(0, 9, rng.integers(1, 40)) for _ in tree]
    forest = plant(
        Ragged.from_rows(trunks),
        tree,
        start,
        Ragged.from_rows(responses),
        int(rng.choice([1, 16, 128])),
    )
    rows, length = forest.tokens.shape

    def visible(row, head, i, j):
        return (j <= i) & (i < forest.end[row, j])

    expected, found = (
        create_block_mask(visible, rows, None, length, length, device="cpu"),
        _block_mask(None, forest, None),
    )
    for kind in ("kv", "full_kv", "q", "full_q"):
        count, numbers = (
            getattr(expected, f"{kind}_num_blocks"),
            getattr(expected, f"{kind}_indices"),
        )
        listed = torch.arange(numbers.shape[-1]) < count[..., None]
        assert getattr(found, f"{kind}_num_blocks").equal(count)
        assert getattr(found, f"{kind}_indices").where(listed, -1).equal(numbers.where(listed, -1))
    assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from([(2, 1), (16, 1), (1, 64), (1, 12), (4, 6)]))
def test_padded_rows_hold_the_same_trees(batch, padding):
    plain, padded = planted(*batch), planted(*batch, *padding)
    rows, length = plain.tokens.shape
    multiple, together = padding
    shapes = [
        (more, longer)
        for more in range(rows, rows + together)
        for longer in range(length, length + multiple * together)
        if longer % multiple == 0 and more * longer % together == 0
    ]
    fewest = min(more * longer for more, longer in shapes)
    assert padded.tokens.shape in shapes and padded.tokens.numel() == fewest
    for name in ("tokens", "positions", "end"):
        assert getattr(padded, name)[:rows, :length].equal(getattr(plain, name))
    assert padded.attention()[:rows, :length, :length].equal(plain.attention())
    for alone in (padded.attention()[:, length:], padded.attention()[rows:]):
        assert alone.sum() == alone.shape[0] * alone.shape[1]
    row, column = np.divmod(plain.states, length)
    assert padded.states.equal(row * padded.tokens.shape[1] + column)
    assert padded.edge_state.equal(plain.edge_state) and padded.size == plain.size


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 30)), min_size=1, max_size=5),
    st.integers(0, 200),
    st.floats(0, 1000),
    st.integers(0, 2**32 - 1),
)
def test_a_wide_tree_is_cut_into_the_parts_that_cost_least(trees, branch, breadth, seed):
    """By trying every number of equal parts: a tree is cut as the best of them, to within the
    rounding of its width, and only where that costs two thirds at most."""
    trunks = Ragged.from_rows([list(range(1, 1 + length)) for length, _ in trees])
    rng = np.random.default_rng(seed)
    tree = rng.permutation(np.repeat(np.arange(len(trees)), [prompts for _, prompts in trees]))
    wide = np.full(len(tree), branch) + rng.integers(0, 3, len(tree))
    cut, part = cut_wide(trunks, tree, wide, breadth)
    for number, (length, prompts) in enumerate(trees):
        mine = part[tree == number]
        parts = len(set(mine.tolist())) or 1

        width = float(wide[tree == number].sum())

        def cost(count, width=width, length=length):
            row = length + width / count
            return count * row * (breadth + row)

        best = min(range(1, 1 + max(prompts, 1)), key=cost)
        assert cost(parts) <= min(cost(best) * 1.5, cost(1)) * (1 + 1e-9)
        if parts > 1:
            assert cost(parts) * 1.5 < cost(1)
            assert (np.diff(mine) >= 0).all()  # what follows on the trunk stays together
            assert np.ptp(np.bincount(mine - mine[0])) <= 1  # as many prompts in each, but for one
    for number, row in enumerate(cut):
        (owner,) = {*tree[part == number].tolist()} or {None}
        if owner is not None:
            assert row.tolist() == list(range(1, 1 + trees[owner][0]))


def test_a_row_without_a_price_is_left_whole():
    trunks, tree = Ragged.from_rows([[1, 2, 3]]), np.zeros(3, np.int64)
    assert cut_wide(trunks, tree, np.full(3, 10**6), np.inf) == (trunks, tree)
