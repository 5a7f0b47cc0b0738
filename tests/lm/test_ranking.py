"""A catalogue ranked under kept prompts against one full sequence at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_sdpo.lm import ranking
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.ranking import TitleTree, _with_ancestors, score_all, score_top
from recbole_sdpo.ragged import Ragged
from tests.lm.test_architectures import EAGER_ONLY, NAMES, build, one_by_one

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5], [5, 6, 20]]


def catalogue(rng: np.random.Generator, number: int, tokens: int = 4) -> list[list[int]]:
    """Titles that share beginnings, some twice, each with the terminator 3."""
    return [[*rng.integers(4, 4 + tokens, rng.integers(0, 5)), 3] for _ in range(number)]


def expected(model, prompts, titles) -> torch.Tensor:
    pairs = [(p, t) for p in range(len(prompts)) for t in range(len(titles))]
    tree, title = map(np.array, zip(*pairs, strict=True))
    starts = np.array([len(prompts[p]) for p in tree])
    return one_by_one(model, prompts, tree, starts, [titles[t] for t in title]).view(
        len(prompts), len(titles)
    )


@pytest.mark.parametrize("name", [*NAMES, *EAGER_ONLY])
@torch.no_grad()
def test_all_and_top_equal_one_by_one(name, monkeypatch):
    monkeypatch.setattr(ranking, "NODES_AT_ONCE", 9)
    titles = catalogue(np.random.default_rng(0), 40)
    model = build(name, "eager" if name in EAGER_ONLY else "sdpa", True, torch.float64)
    lm, tree, slow = (
        LanguageModel(model, None),
        TitleTree(Ragged.from_rows(titles)),
        expected(model, PROMPTS, titles),
    )
    assert len(tree.blocks) > 3
    torch.testing.assert_close(
        score_all(lm, Ragged.from_rows(PROMPTS), tree), slow, rtol=0, atol=1e-5
    )
    check_top(score_top(lm, Ragged.from_rows(PROMPTS), tree, 5), slow, 5)


def check_top(found: torch.Tensor, slow: torch.Tensor, k: int) -> None:
    """The k best have their scores; the rest are bounded from above, and below the k-th."""
    best, where = slow.topk(k)
    assert not (found < slow - 1e-5).any()
    torch.testing.assert_close(found.topk(k).values, best, rtol=0, atol=1e-5)
    rest = slow < best[:, -1:] - 1e-5
    assert (found[rest] < best[:, -1:].expand_as(found)[rest] + 1e-5).all()
    torch.testing.assert_close(found.gather(1, where), best, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def sharp():
    """A model whose distributions are far from uniform, so that the search can leave much out."""
    model = build("Llama", "sdpa", False, torch.float64)
    model.lm_head.weight.data.mul_(12)
    return model


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    number=st.integers(1, 30),
    k=st.integers(1, 40),
    tokens=st.integers(1, 5),
)
@torch.no_grad()
def test_any_catalogue_and_any_k(sharp, seed, number, k, tokens):
    rng = np.random.default_rng(seed)
    titles = catalogue(rng, number, tokens)
    prompts = [rng.integers(4, 40, rng.integers(1, 6)).tolist() for _ in range(3)]
    lm, tree, slow = (
        LanguageModel(sharp, None),
        TitleTree(Ragged.from_rows(titles)),
        expected(sharp, prompts, titles),
    )
    torch.testing.assert_close(
        score_all(lm, Ragged.from_rows(prompts), tree), slow, rtol=0, atol=1e-5
    )
    check_top(score_top(lm, Ragged.from_rows(prompts), tree, k), slow, min(k, number))


@torch.no_grad()
def test_an_unsure_model_has_all_titles_scored(sharp, monkeypatch):
    monkeypatch.setattr(ranking, "NODES_AT_ONCE", 12)
    rng, prompts = np.random.default_rng(3), Ragged.from_rows(PROMPTS)
    titles = [[*rng.integers(4, 8, 4), 3] for _ in range(60)]
    lm, tree = (
        LanguageModel(build("Llama", "sdpa", False, torch.float64), None),
        TitleTree(Ragged.from_rows(titles)),
    )
    whole = []
    score = ranking.score_all
    monkeypatch.setattr(
        ranking,
        "score_all",
        lambda lm, prompts, tree: whole.append(len(prompts)) or score(lm, prompts, tree),
    )
    check_top(score_top(lm, prompts, tree, 8), score(lm, prompts, tree), 8)
    assert whole
    whole.clear()
    check_top(
        score_top(LanguageModel(sharp, None), prompts, tree, 8),
        score(LanguageModel(sharp, None), prompts, tree),
        8,
    )


@pytest.mark.parametrize("room", [1, 12, 40])
@torch.no_grad()
def test_a_large_catalogue_is_searched_in_little_room(sharp, monkeypatch, room):
    """What was opened is forgotten when there is no room, and the search goes on."""
    rng, prompts = np.random.default_rng(4), Ragged.from_rows(PROMPTS)
    lm, tree = (
        LanguageModel(sharp, None),
        TitleTree(Ragged.from_rows(catalogue(rng, 3000, tokens=12))),
    )
    truth = score_all(lm, prompts, tree)
    monkeypatch.setattr(ranking, "NODES_AT_ONCE", room)
    monkeypatch.setattr(ranking, "score_all", None)
    widths, extend = [], ranking._Prompted.extend
    monkeypatch.setattr(
        ranking._Prompted,
        "extend",
        lambda self, tree, nodes: widths.append(nodes.shape[1]) or extend(self, tree, nodes),
    )
    check_top(score_top(lm, prompts, tree, 6), truth, 6)
    assert len(widths) > 1 and max(widths) <= max(room, int(tree.whole.positions.max()))


@given(seed=st.integers(0, 10**6))
def test_nodes_come_with_what_stands_above_them_each_once(seed):
    rng = np.random.default_rng(seed)
    tree = TitleTree(Ragged.from_rows(catalogue(rng, 30)))
    parent, depth = tree.before, int(tree.whole.positions.max())
    rows = [rng.integers(1, max(2, tree.nodes), rng.integers(1, 6)) % tree.nodes for _ in range(3)]
    nodes = torch.from_numpy(Ragged.from_rows([np.unique(row[row > 0]) for row in rows]).padded(-1))
    for row, path in zip(nodes, _with_ancestors(nodes, torch.from_numpy(parent), depth)):
        above, last = set(), set(row.tolist()) - {-1}
        while last:
            above |= last
            last = {int(parent[node]) for node in last} - {0}
        assert sorted(path[path >= 0].tolist()) == sorted(above)


@torch.no_grad()
def test_what_is_not_a_number_stays_so():
    model = build("Llama", "sdpa", False, torch.float64)
    model.model.norm.weight[0] = torch.nan
    lm, tree = (
        LanguageModel.__new__(LanguageModel),
        TitleTree(Ragged.from_rows(catalogue(np.random.default_rng(0), 9))),
    )
    torch.nn.Module.__init__(lm)
    lm.model, lm.attention, lm.mixed = model, "sdpa", False
    assert score_top(lm, Ragged.from_rows(PROMPTS), tree, 2).isnan().any(1).all()


@torch.no_grad()
def test_the_search_leaves_out_what_cannot_be_among_the_best(sharp, monkeypatch):
    titles = catalogue(np.random.default_rng(1), 4000, tokens=30)
    lm, tree = LanguageModel(sharp, None), TitleTree(Ragged.from_rows(titles))
    computed = []
    sharp.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    looked_through, topk = [], torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor,
        "topk",
        lambda self, k: looked_through.append(self.shape[1]) or topk(self, k),
    )
    score_top(lm, Ragged.from_rows([PROMPTS[0]]), tree, 3)
    opened = sum(computed) - len(PROMPTS[0])
    assert opened < tree.nodes / 4
    # each round, at most what leaves the root and the nodes opened so far, and k
    most = int(np.diff(tree.edges[0]).max())
    assert 0 < max(looked_through) <= (1 + opened) * most + 3
    assert max(looked_through) < len(tree) / 2
