"""A whole catalogue under each of many prompts: every title scored, or the best found first.

The prompts' keys and values are computed once. All titles stand in one tree, whose root stands for
any prompt; the nodes of the tree are computed under the kept prompts, as many at a time as memory
has room for.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recbole_sdpo.lm.attention import additive, dense_implementation, for_each_kind, set_attention
from recbole_sdpo.lm.forest import Forest, plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.projection import token_logps
from recbole_sdpo.ragged import Ragged, exclusive_cumsum

NODES_AT_ONCE = 256
"""Nodes that are kept for a prompt at a time, or nearly: attention among them costs the square
of it."""


class TitleTree:
    """The titles of a catalogue in one tree; column 0 of it, the root, stands for the prompt.

    Args:
        titles: the tokens of each title with its terminator, none empty.
    """

    def __init__(self, titles: Ragged) -> None:
        self.titles = titles

    def __len__(self) -> int:
        return len(self.titles)

    @cached_property
    def whole(self) -> Forest:
        """The tree of all titles."""
        return _under_root(self.titles)

    @cached_property
    def blocks(self) -> list[tuple[Tensor, Forest]]:
        """The titles in sorted order, cut: the numbers of a block's titles, int64, and their own
        tree."""
        # one long title widens no other
        rows = [row.tolist() for row in np.split(self.titles.values, self.titles.starts[1:])]
        # Sorted, titles that begin alike are neighbours, and their block's tree has that beginning
        # once.
        order = np.array(sorted(range(len(rows)), key=rows.__getitem__))
        # A title's last token is predicted and predicts nothing: it needs no node.
        number = exclusive_cumsum(self.titles.lengths[order] - 1) // NODES_AT_ONCE
        cuts = np.flatnonzero(np.diff(number)) + 1
        return [
            (torch.from_numpy(block), _under_root(self.titles.take(block)))
            for block in np.split(order, cuts)
        ]

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What leaves each node, sorted by node: where from ``[E]``, by which token ``[E]``, and
        where to ``[E]``.

        Where to is the number of a node, or that of a title plus the number of nodes where the
        title ends.
        """
        tree, nodes = self.whole, self.nodes
        state, token, title, step = (
            part.numpy()
            for part in (tree.edge_state, tree.edge_token, tree.edge_response, tree.edge_step)
        )
        node_after = np.full((len(self), int(self.titles.lengths.max()) + 1), -1)
        node_after[title, step] = state  # the node before a title's step-th token
        to = node_after[title, step + 1]
        to = np.where(to < 0, nodes + title, to)
        # titles that begin alike share their first edges
        _, once = np.unique(to, return_index=True)
        once = once[np.argsort(state[once], kind="stable")]
        return state[once], token[once], to[once]

    @property
    def nodes(self) -> int:
        """Nodes, the root included; each of them predicts."""
        return len(self.whole.states)


class _Prompted:
    """Prompts with their keys and values, and after them those of the nodes of a tree that were
    computed under them."""

    def __init__(self, lm: LanguageModel, prompts: Ragged) -> None:
        self.model: PreTrainedModel = lm.causal_lm
        self.arithmetic = lm.arithmetic
        self.dtype = torch.bfloat16 if lm.mixed else lm.causal_lm.dtype
        set_attention(self.model, dense_implementation(self.model, lm.attention))
        device = self.model.device
        tokens, self.lengths = (
            torch.from_numpy(prompts.padded(0)).to(device),
            torch.from_numpy(prompts.lengths).to(device),
        )
        # without the model's config, so that layers with a window keep what is beyond it, too
        self.cache = DynamicCache()
        with self.arithmetic():
            hidden = self.model.base_model(
                input_ids=tokens, past_key_values=self.cache, use_cache=True
            ).last_hidden_state
        self.root = hidden[torch.arange(len(prompts), device=device), self.lengths - 1]
        self.columns = torch.arange(tokens.shape[1], device=device)
        self.nodes = self.lengths.new_empty(len(prompts), 0)

    def extend(self, tree: Forest, nodes: Tensor) -> Tensor:
        """The last hidden states of further nodes, ``[B, n, H]``; their ancestors must be here
        already, or among them.

        Args:
            nodes: int64 ``[B, n]``, columns of ``tree``, -1 for none.
        """
        self.nodes = torch.cat([self.nodes, nodes], dim=1)
        end, depth = tree.end[0], tree.positions[0]
        # none looks like the root, so that it sees the prompt's last token, and its state is finite
        shown = nodes.clamp(min=0)
        position = self.lengths[:, None] - 1 + depth[shown]
        query, key = nodes[:, :, None], self.nodes[:, None, :]
        on_path = (key <= query) & (query < end[key]) & (key >= 0)

        def mask(window: int | None) -> Tensor:
            in_prompt = (self.columns < self.lengths[:, None])[:, None].expand(
                -1, nodes.shape[1], -1
            )
            above = on_path
            if window is not None:
                in_prompt = in_prompt & (position[:, :, None] - self.columns < window)
                above = above & (depth[query] - depth[key] < window)
            return additive(torch.cat([in_prompt, above], dim=2)[:, None], self.dtype)

        with self.arithmetic():
            return self.model.base_model(
                input_ids=tree.tokens[0][shown],
                attention_mask=for_each_kind(self.model, mask),
                position_ids=position,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state

    def logps(self, hidden: Tensor, edge_state: Tensor, edge_token: Tensor) -> Tensor:
        """As :func:`token_logps`."""
        with self.arithmetic():
            return token_logps(self.model, hidden, edge_state, edge_token)

    def forget(self) -> None:
        """Keep the prompts alone."""
        self.cache.crop(-self.nodes.shape[1])
        self.nodes = self.nodes[:, :0]

    def select(self, rows: Tensor) -> None:
        """Keep the given prompts alone."""
        self.cache.batch_select_indices(rows)
        self.root, self.lengths, self.nodes = self.root[rows], self.lengths[rows], self.nodes[rows]


@torch.no_grad()
def score_all(lm: LanguageModel, prompts: Ragged, catalogue: TitleTree) -> Tensor:
    """log pi of every title after each prompt, ``[prompts, titles]``, as one pass over each pair
    would give it."""
    prompted = _Prompted(lm, prompts)
    rows = len(prompts)
    scores = torch.empty(rows, len(catalogue), device=lm.device, dtype=_dtype(lm))
    for members, tree in catalogue.blocks:
        tree = tree.to(lm.device)
        nodes = len(tree.states)
        hidden = prompted.root[:, None]
        if nodes > 1:
            below = torch.arange(1, nodes, device=lm.device).expand(rows, -1)
            hidden = torch.cat([hidden, prompted.extend(tree, below)], dim=1)
            prompted.forget()
        # Flattened, the block's states under prompt r begin at r * nodes.
        first = nodes * torch.arange(rows, device=lm.device)[:, None]
        logps = prompted.logps(
            hidden.flatten(0, 1), (first + tree.edge_state).flatten(), tree.edge_token.repeat(rows)
        )
        scores[:, members.to(lm.device)] = tree.sum_by_response(logps.view(rows, -1))
    return scores


@torch.no_grad()
def score_top(lm: LanguageModel, prompts: Ragged, catalogue: TitleTree, k: int) -> Tensor:
    """As :func:`score_all` for the ``k`` best titles of each prompt; a bound from above for the
    rest, ``[prompts, titles]``.

    Best first: the log-probability of a prefix bounds that of every title that begins with it, so
    that what lies under a prefix below the k-th best title found need not be looked at. All bounds
    are below the k-th best score. A prompt for which the model is so unsure that more than
    :data:`NODES_AT_ONCE` nodes would be opened has all titles scored.

    Args:
        k: at least 1; more than the catalogue has means all of it.
    """
    prompted = _Prompted(lm, prompts)
    tree, nodes, k = catalogue.whole.to(lm.device), catalogue.nodes, min(k, len(catalogue))
    start, token, leads_to = (torch.from_numpy(part).to(lm.device) for part in catalogue.edges)
    degree = torch.bincount(start, minlength=nodes)
    first = degree.cumsum(0) - degree
    # The log-probability of each prefix and, after the nodes, of each title; -inf for what is not
    # known yet.
    table = torch.full(
        (len(prompts), nodes + len(catalogue)), -torch.inf, device=lm.device, dtype=_dtype(lm)
    )
    table[:, 0] = 0
    # known, but not what follows
    frontier = torch.zeros(len(prompts), nodes, dtype=torch.bool, device=lm.device)

    def expand(rows: Tensor, opened: Tensor, hidden: Tensor) -> None:
        """Find the log-probabilities of all that leaves node ``opened[i]`` of prompt
        ``rows[i]``; all ``[n]``, and ``[n, H]``."""
        # Edges are sorted by where they leave: those of a node are first, first + 1, …
        count = degree[opened]
        state = torch.repeat_interleave(count)
        edge = (
            torch.arange(len(state), device=lm.device)
            - (count.cumsum(0) - count)[state]
            + first[opened][state]
        )
        logps = prompted.logps(hidden, state, token[edge])
        table[rows[state], leads_to[edge]] = table[rows, opened][state] + logps
        frontier[rows, opened] = False
        inner = leads_to[edge] < nodes
        frontier[rows[state][inner], leads_to[edge][inner]] = True

    active = torch.arange(len(prompts), device=lm.device)
    expand(active, torch.zeros_like(active), prompted.root)
    width = k
    while True:
        bounds = table[active, :nodes]
        bounds = bounds.masked_fill(~frontier[active] | bounds.isnan(), -torch.inf)
        kth = table[active, nodes:].topk(k).values[:, -1:]
        bounds, best = bounds.topk(min(width, nodes))
        promising = (bounds >= kth) & (bounds > -torch.inf)
        unfinished = promising.any(1)
        if not unfinished.any():
            break
        if not unfinished.all():
            prompted.select(unfinished.nonzero()[:, 0])
            active, best, promising = active[unfinished], best[unfinished], promising[unfinished]
        most = int(promising.sum(1).max())  # sorted: the first of each row
        if prompted.nodes.shape[1] + most > NODES_AT_ONCE:
            table[active, nodes:] = score_all(lm, prompts.take(active.cpu().numpy()), catalogue)
            break
        best, promising = best[:, :most], promising[:, :most]
        hidden = prompted.extend(tree, best.where(promising, -1))
        expand(active[:, None].expand_as(best)[promising], best[promising], hidden[promising])
        # A prompt that is sure has few nodes opened for nothing, and one that is not, few rounds.
        width *= 2

    prefix, titles, depth = table[:, :nodes], table[:, nodes:], tree.positions[0]
    inner = leads_to < nodes
    parent = torch.zeros(nodes, dtype=torch.long, device=lm.device)
    parent[leads_to[inner]] = start[inner]
    # What was not opened has the bound of the nearest prefix above it that is known, found level by
    # level from the root on.
    for at in range(1, int(depth.max()) + 1):
        level = (depth == at).nonzero()[:, 0]
        prefix[:, level] = prefix[:, level].where(
            prefix[:, level] != -torch.inf, prefix[:, parent[level]]
        )
    last = torch.empty(len(catalogue), dtype=torch.long, device=lm.device)
    last[leads_to[~inner] - nodes] = start[~inner]
    return titles.where(titles != -torch.inf, prefix[:, last])


def _under_root(titles: Ragged) -> Forest:
    none = np.zeros(len(titles), np.int64)
    return plant(Ragged(np.zeros(1, np.int64), np.ones(1, np.int64)), none, none + 1, titles)


def _dtype(lm: LanguageModel) -> torch.dtype:
    return torch.float64 if lm.causal_lm.dtype == torch.float64 else torch.float32
