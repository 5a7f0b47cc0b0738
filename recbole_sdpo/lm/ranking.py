"""A whole catalogue under each of many prompts: every title scored, or the best found first.

The prompts' keys and values are computed once. All titles stand in one tree, whose root stands for
any prompt; the nodes of the tree are computed under the kept prompts, as many at a time as memory
has room for.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
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
        self._on: dict[torch.device, tuple[Forest, list[Tensor]]] = {}

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
        """What leaves each node: its first edge, and E, ``[nodes + 1]``; by which token ``[E]``;
        and where to ``[E]``.

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
        return np.searchsorted(state[once], np.arange(nodes + 1)), token[once], to[once]

    @cached_property
    def before(self) -> np.ndarray:
        """The node that each node or title comes after, int64 ``[nodes + titles]``, numbered as in
        :attr:`edges`; the root, 0, is its own."""
        first, _, to = self.edges
        before = np.zeros(self.nodes + len(self), np.int64)
        before[to] = np.repeat(np.arange(self.nodes), np.diff(first))
        return before

    @cached_property
    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """In a depth-first order of the titles, from which place on those under a node stand, or
        a title, and how many they are; int64 ``[nodes + titles]`` each, numbered as in
        :attr:`edges`."""
        last = self.before[self.nodes :]  # the node before a title's last token
        order = np.argsort(last, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        node, end = np.arange(self.nodes), self.whole.end[0].numpy()
        start, stop = (np.searchsorted(last[order], column) for column in (node, end))
        each = np.concatenate([stop - start, np.ones_like(place)])
        return np.concatenate([start, place]), each

    def on(self, device: torch.device) -> tuple[Forest, list[Tensor]]:
        """:attr:`whole`, and of :attr:`edges`, :attr:`spans` and :attr:`before` each array, on
        ``device``, where they stay."""
        if device not in self._on:
            arrays = [*self.edges, *self.spans, self.before]
            tensors = [torch.from_numpy(array).to(device) for array in arrays]
            self._on[device] = self.whole.to(device), tensors
        return self._on[device]

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
        device = lm.device
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
        if not self.nodes.shape[1]:
            return
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
    are below the k-th best score. Where more than :data:`NODES_AT_ONCE` nodes would be kept, they
    are forgotten, and those to open come with what stands above them. Prompts for which the model
    is so unsure that this costs half of it all have all titles scored.

    Args:
        k: at least 1; more than the catalogue has means all of it.
    """
    prompted = _Prompted(lm, prompts)
    tree, (first, token, leads_to, place, titles_of, parent) = catalogue.on(lm.device)
    nodes, k = catalogue.nodes, min(k, len(catalogue))
    scores = torch.empty(len(prompts), len(catalogue), device=lm.device, dtype=_dtype(lm))
    # Of each prompt that is still searched, the nodes that wait to be opened and the titles, as
    # numbered by the edges, and their log-probabilities; -1 for none. No more than that is looked
    # through in a round, however large the catalogue.
    row = torch.arange(len(prompts), device=lm.device)
    known = torch.zeros(len(prompts), 1, dtype=torch.long, device=lm.device)
    value = torch.zeros(len(prompts), 1, device=lm.device, dtype=scores.dtype)

    def open_nodes(chosen: Tensor, promising: Tensor, hidden: Tensor) -> None:
        """Put what leaves the ``promising`` of the ``chosen [B, n]`` of what is known in their
        place; ``hidden [B, n, H]``."""
        nonlocal known, value
        owner, _ = promising.nonzero(as_tuple=True)
        column = chosen[promising]
        opened, above = known[owner, column], value[owner, column]
        known[owner, column] = -1
        state, edge = _segments(first[opened], first[opened + 1] - first[opened])
        logps = above[state] + prompted.logps(hidden[promising], state, token[edge])
        count = torch.bincount(owner[state], minlength=len(known))
        owner, column = _segments(torch.zeros_like(count), count)
        further = known.new_full((len(known), int(count.max())), -1)
        further[owner, column] = leads_to[edge]
        known = torch.cat([known, further], dim=1)
        value = torch.cat([value, value.new_zeros(further.shape)], dim=1)
        value[:, -further.shape[1] :][owner, column] = logps

    def settle(finished: Tensor) -> None:
        """Give each title what is known of it, or of what it lies under."""
        for number in finished.nonzero()[:, 0].tolist():
            some = known[number] >= 0
            what, found = known[number, some], value[number, some]
            order = place[what].argsort()
            in_order = found[order].repeat_interleave(titles_of[what[order]])
            scores[row[number]] = in_order[place[nodes:]]

    open_nodes(torch.zeros_like(known), known == 0, prompted.root[:, None])
    depth = int(tree.positions[0].max())
    width, cost, afresh = k, 0, False
    while True:
        waiting = (known >= 0) & (known < nodes) & ~value.isnan()
        titles = value.masked_fill(known < nodes, -torch.inf)
        kth = nn.functional.pad(titles, (0, k), value=-torch.inf).topk(k).values[:, -1:]
        bounds, best = value.masked_fill(~waiting, -torch.inf).topk(min(width, known.shape[1]))
        promising = (bounds >= kth) & (bounds > -torch.inf)
        unfinished = promising.any(1)
        settle(~unfinished)
        if not unfinished.any():
            return scores
        if not unfinished.all():
            prompted.select(unfinished.nonzero()[:, 0])
            row, known, value = row[unfinished], known[unfinished], value[unfinished]
            best, promising = best[unfinished], promising[unfinished]
        most = int(promising.sum(1).max())  # sorted: the first of each row
        afresh |= prompted.nodes.shape[1] + most > NODES_AT_ONCE
        if afresh:
            most = min(most, max(1, NODES_AT_ONCE // depth))
        cost += most * depth if afresh else most
        if 2 * cost > max(nodes, 2 * NODES_AT_ONCE):
            scores[row] = score_all(lm, prompts.take(row.cpu().numpy()), catalogue)
            return scores
        best, promising = best[:, :most], promising[:, :most]
        chosen = known.gather(1, best).where(promising, -1)
        if afresh:
            prompted.forget()
            path = _with_ancestors(chosen, parent, depth)
            column = (path[:, None, :] == chosen[:, :, None]).int().argmax(-1)
            hidden = prompted.extend(tree, path)
            hidden = hidden.gather(1, column[:, :, None].expand(-1, -1, hidden.shape[2]))
        else:
            hidden = prompted.extend(tree, chosen)
        open_nodes(best, promising, hidden)
        # A prompt that is sure has few nodes opened for nothing, and one that is not, few rounds.
        width *= 2


def _with_ancestors(nodes: Tensor, parent: Tensor, depth: int) -> Tensor:
    """Each row of ``nodes [B, n]`` and what stands above them but for the root, each once, and -1
    for none."""
    paths = [nodes.clamp(min=0)]
    for _ in range(depth - 1):
        paths.append(parent[paths[-1]])
    path = torch.cat(paths, dim=1).sort(dim=1, descending=True).values
    path[:, 1:][path[:, 1:] == path[:, :-1]] = 0
    path = path.sort(dim=1, descending=True).values
    path = path[:, : max(1, int((path > 0).sum(1).max()))]
    return path.where(path > 0, -1)


def _segments(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """``count[i]`` numbers from ``start[i]`` on, one after another; and of each its ``i``, which
    comes first."""
    owner = torch.repeat_interleave(count)
    shift = start - (count.cumsum(0) - count)
    return owner, torch.arange(len(owner), device=count.device) + shift[owner]


def _under_root(titles: Ragged) -> Forest:
    none = np.zeros(len(titles), np.int64)
    return plant(Ragged(np.zeros(1, np.int64), np.ones(1, np.int64)), none, none + 1, titles)


def _dtype(lm: LanguageModel) -> torch.dtype:
    return torch.float64 if lm.causal_lm.dtype == torch.float64 else torch.float32
