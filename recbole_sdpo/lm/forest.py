"""The prefix forest: prompts and responses in which every distinct prefix is one token.

Each tree has a **trunk** (a prompt, or a whole history of which every prefix is a prompt) and
**branches** (responses that leave the trunk somewhere). Responses follow the trunk and each other
for as long as their tokens agree. A response's last token is predicted but predicts nothing, so it
has no place in the tree. Below, three responses follow the prompt ``a b`` of the trunk ``a b c d``,
and one follows all of it::

    response  prompt
    c x y     a b            a - b - c - d - p
    p q r     a b                |   |
    p s t     a b                |   +-- x
    p q       a b c d            +-- p - q
                                     |
                                     +-- s

A tree is laid out depth-first, branches before the rest of the trunk, so that token ``j`` is an
ancestor of ``i``, or ``i`` itself, exactly when ``j <= i < end[j]``. That is the mask of attention
(``#``: the row's token sees the column's). ``asked`` are the tokens, each of a response, whose
log-probability after the column's token is asked for::

    column      0   1   2   3   4   5   6   7   8
    token       a   b   p   q   s   c   x   d   p
    position    0   1   2   3   3   2   3   3   4
    end         9   9   5   4   5   9   7   9   9
    asked       -  cpp qs   r   t   x   y   p   q

    sees   a    #
           b    #   #
           p    #   #   #
           q    #   #   #   #
           s    #   #   #   .   #
           c    #   #   .   .   .   #
           x    #   #   .   .   .   #   #
           d    #   #   .   .   .   #   .   #
           p    #   #   .   .   .   #   .   #   #
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_sdpo.errors import UserError
from recbole_sdpo.ragged import Ragged, exclusive_cumsum, places


@dataclass(frozen=True)
class Forest:
    """``B`` trees, one to a row, and what is asked: the log-probabilities of ``R`` responses.

    Attributes:
        tokens: int64 ``[B, L]``, right-padded with 0; last rows may be padding alone.
        positions: int64 ``[B, L]``, the depth of each token in its tree, which is its position in
            its sequence.
        end: int64 ``[B, L]``, one past the column of the last descendant; padding sees only itself.
        states: int64 ``[S]``, increasing indices into the flattened ``B * L`` of the distinct
            tokens that predict.
        edge_state: int64 ``[E]``, increasing: for each predicted token the entry of ``states`` that
            predicts it.
        edge_token: int64 ``[E]``, the predicted token.
        edge_response: int64 ``[E]``, the response that it belongs to.
        edge_step: int64 ``[E]``, which of the response's tokens it is.
        first_edge: int64 ``[S + 1]``, on the host: each state's first edge, and ``E``.
        steps: tokens of the longest response.
        responses: ``R``.
        chains: true where no tree branches, so that plain causal attention is the same.
        size: tokens in all trees, padding left out.
    """

    tokens: Tensor
    positions: Tensor
    end: Tensor
    states: Tensor
    edge_state: Tensor
    edge_token: Tensor
    edge_response: Tensor
    edge_step: Tensor
    first_edge: np.ndarray
    steps: int
    responses: int
    chains: bool
    size: int

    def to(self, device: torch.device | str) -> Forest:
        """The same forest on ``device``."""
        return self._with_each(lambda part: part.to(device, non_blocking=True))

    def lengths(self) -> Tensor:
        """Tokens of each response, int64 ``[R]``, where the forest is."""
        return torch.bincount(self.edge_response, minlength=self.responses)

    def openings(self) -> Tensor:
        """The entry of ``states`` that predicts the first token of each response, int64 ``[R]``,
        where the forest is."""
        # As in sum_by_response; a mask over the edges would be waited for.
        table = self.edge_state.new_zeros(self.responses, self.steps)
        table[self.edge_response, self.edge_step] = self.edge_state
        return table[:, 0]

    def pin_memory(self) -> Forest:
        """The same forest in memory from which a GPU copies while the host goes on."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, move: Callable[[Tensor], Tensor]) -> Forest:
        parts = vars(self).items()
        moved: dict[str, Any] = {
            name: move(part) for name, part in parts if isinstance(part, Tensor)
        }
        return replace(self, **moved)

    def attention(self, window: int | None = None) -> Tensor:
        """bool ``[B, L, L]``: may token ``i`` (dim 1) attend to ``j`` (dim 2)?

        Args:
            window: for layers with sliding attention, the number of positions that a token sees,
                itself included.
        """
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        visible = (column <= column[:, None]) & (column[:, None] < self.end[:, None, :])
        if window is not None:
            visible &= self.positions[:, :, None] - self.positions[:, None, :] < window
        return visible

    def sum_by_response(self, logps: Tensor) -> Tensor:
        """Of what belongs to the edges, ``[…, E]``, the sum over each response, ``[…, R]``."""
        # Each token has a place of its own, so that the sum has one order on every device.
        table = logps.new_zeros(*logps.shape[:-1], self.responses, self.steps)
        table[..., self.edge_response, self.edge_step] = logps
        return table.sum(-1)


def cut_wide(
    trunks: Ragged, tree: np.ndarray, branch: np.ndarray, breadth: float
) -> tuple[Ragged, np.ndarray]:
    """Cut trees that are so wide that it is cheaper to compute their trunk several times.

    Attention without blocks looks at all pairs of a row. Of a tree with a trunk of ``t`` tokens and
    ``w`` on branches, cut into ``n`` parts, a layer costs about
    ``n * (t + w / n) * (breadth + t + w / n)``, least where a part has ``sqrt(t * (t + breadth))``
    tokens on branches. Each part has the trunk as far as its own prompts need it (:func:`plant`)::

        a - b - c - d          a - b          a - b - c - d
            |   |   |    ->        |    and           |   |
            x   y   z              x                  y   z

    Args:
        trunks: of the trees.
        tree: int64 ``[T]``, the tree of each prompt.
        branch: int64 ``[T]``, about how many tokens the prompt has on branches.
        breadth: tokens of a row at which attention costs as much as all else; infinite where it
            looks at no more than it needs.

    Returns:
        the trunks of the parts, and the part of each prompt; trees whose cost falls by less than
        a third are left whole, for a cut changes numbers by rounding.
    """
    length, prompts = trunks.lengths, np.bincount(tree, minlength=len(trunks))
    wide = np.bincount(tree, weights=branch, minlength=len(trunks))

    def cost(parts: np.ndarray) -> np.ndarray:
        row = length + wide / parts
        return parts * row * (breadth + row)

    if not np.isfinite(breadth):
        return trunks, tree
    least = wide / np.sqrt(length * (length + breadth))
    few, many = (count(least).clip(1, prompts.clip(1)) for count in (np.floor, np.ceil))
    best = np.where(cost(few) < cost(many), few, many)
    parts = np.where(cost(best) * 1.5 < cost(np.ones_like(best)), best, 1).astype(np.int64)
    place = np.empty_like(tree)
    place[np.argsort(tree, kind="stable")] = places(prompts)
    part = exclusive_cumsum(parts)[tree] + place * parts[tree] // prompts[tree]
    return trunks.take(np.repeat(np.arange(len(trunks)), parts)), part


def plant(
    trunks: Ragged,
    tree: np.ndarray,
    start: np.ndarray,
    responses: Ragged,
    multiple: int = 1,
    together: int = 1,
) -> Forest:
    """Build the forest of the given trunks and responses.

    Args:
        trunks: the tokens of each of the ``B`` trunks, none negative.
        tree: int ``[R]``, the trunk of each response.
        start: int ``[R]``, how many of its trunk's tokens are the response's prompt, at least 1.
        responses: the tokens of each of the ``R`` responses, none empty, no token negative.
        multiple: the length of the rows is padded to a multiple of it.
        together: the tokens of all rows are padded to a multiple of it, by longer rows or by
            empty ones, whichever takes fewer. A row may then be no tree's.

    Raises:
        UserError: a response is empty, or its prompt is empty or longer than its trunk.
    """
    tree, start = np.asarray(tree, np.int64), np.asarray(start, np.int64)
    _check(trunks, tree, start, responses)
    follows = _follow_trunks(trunks, tree, start, responses)
    branches = _merge_branches(tree, start, follows, responses)
    # Of each trunk what is a prompt or followed by a response has a place.
    lengths = np.zeros(len(trunks), np.int64)
    np.maximum.at(lengths, tree, start + np.minimum(follows, responses.lengths - 1))
    trunks = trunks.cut(np.arange(len(trunks)), np.zeros_like(lengths), lengths)
    layout = _lay_out(trunks, branches, multiple, together)
    states, (state, token, response, step) = _ask(
        layout, trunks, tree, start, follows, branches, responses
    )
    return Forest(
        tokens=torch.from_numpy(layout.tokens),
        positions=torch.from_numpy(layout.positions),
        end=torch.from_numpy(layout.end),
        states=torch.from_numpy(states),
        edge_state=torch.from_numpy(state),
        edge_token=torch.from_numpy(token),
        edge_response=torch.from_numpy(response),
        edge_step=torch.from_numpy(step),
        first_edge=np.searchsorted(state, np.arange(len(states) + 1)),
        steps=int(responses.lengths.max(initial=0)),
        responses=len(responses),
        chains=not branches.fresh.any(),
        size=int(layout.sizes.sum()),
    )


def _check(trunks: Ragged, tree: np.ndarray, start: np.ndarray, responses: Ragged) -> None:
    if responses.lengths.min(initial=1) < 1:
        empty = responses.lengths.argmin()
        raise UserError(f"response {empty} has no token; each needs at least one.")
    outside = (start < 1) | (start > trunks.lengths[tree])
    if outside.any():
        first = int(outside.argmax())
        raise UserError(
            f"response {first} starts after {start[first]} tokens of a trunk of "
            f"{trunks.lengths[tree[first]]}; it must be 1 to the trunk's length."
        )


def _follow_trunks(
    trunks: Ragged, tree: np.ndarray, start: np.ndarray, responses: Ragged
) -> np.ndarray:
    """How many of its first tokens each response has in common with its trunk, int64 ``[R]``."""
    tokens = responses.padded(-1)
    ahead = np.minimum(trunks.lengths[tree] - start, responses.lengths)
    trunk = trunks.cut(tree, start, ahead).padded(-2, tokens.shape[1])
    return np.logical_and.accumulate(tokens == trunk, axis=1).sum(1)


@dataclass(frozen=True)
class _Branches:
    """The ``N`` responses that leave their trunks, from there on, in the order of tree, site and
    tokens. Then a branch shares its beginning with the one before it, or with none before it.

    A token that several branches share is one **node**; nodes are numbered in this order.

    Attributes:
        response: int64 ``[N]``, whose branch it is.
        tree: int64 ``[N]``.
        site: int64 ``[N]``, how many tokens of the trunk are before it.
        tokens: int64 ``[N, W]``, padded with -1.
        fresh: bool ``[N, W]``, where a branch has a node that none before it has.
        node: int64 ``[N, W]``, the node of each token; anything where there is none.
        node_end: int64 ``[nodes]``, one past the number of each node's last descendant.
    """

    response: np.ndarray
    tree: np.ndarray
    site: np.ndarray
    tokens: np.ndarray
    fresh: np.ndarray
    node: np.ndarray
    node_end: np.ndarray


def _merge_branches(
    tree: np.ndarray, start: np.ndarray, follows: np.ndarray, responses: Ragged
) -> _Branches:
    lengths = responses.lengths - 1 - follows
    response = np.flatnonzero(lengths > 0)
    rest = responses.cut(response, follows[response], lengths[response])
    tokens, tree, site = rest.padded(-1), tree[response], (start + follows)[response]
    # lexsort's last key counts most: tree, then site, then the first token, the second, …
    order = np.lexsort((*tokens.T[::-1], site, tree))
    response, tree, site = response[order], tree[order], site[order]
    tokens, lengths = tokens[order], rest.lengths[order]
    shared = _shared_with_previous(tree, site, tokens, lengths)

    # Of a token that is not fresh, the node is that of the branch before.
    depth = np.arange(tokens.shape[1])
    fresh = (depth >= shared[:, None]) & (depth < lengths[:, None])
    first = exclusive_cumsum(lengths - shared)
    number = np.where(fresh, first[:, None] + depth - shared[:, None], -1)
    node = np.maximum.accumulate(number, axis=0)

    # A node's descendants end at the first later branch that shares less than reaches the node.
    nodes = int((lengths - shared).sum())
    parting = np.where(shared[:, None] <= depth, first[:, None], nodes)
    parting = np.vstack([parting, np.full((1, len(depth)), nodes)])
    end = np.minimum.accumulate(parting[::-1], axis=0)[::-1][1:]
    return _Branches(response, tree, site, tokens, fresh, node, end[fresh])


def _shared_with_previous(
    tree: np.ndarray, site: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """How many first tokens each branch has in common with the one before, int64 ``[N]``."""
    shared = np.zeros(len(lengths), np.int64)
    if len(lengths) > 1:
        agree = np.logical_and.accumulate(tokens[1:] == tokens[:-1], axis=1).sum(1)
        together = (tree[1:] == tree[:-1]) & (site[1:] == site[:-1])
        # Two that end at one place agree in their padding, too.
        shared[1:] = np.where(together, np.minimum(agree, lengths[1:]), 0)
    return shared


@dataclass(frozen=True)
class _Layout:
    """Where everything stands.

    Attributes:
        tokens, positions, end: as of :class:`Forest`.
        sizes: int64 ``[B]``, tokens in each tree.
        trunk_column: int64 ``[all tokens of trunks]``.
        node_column: int64 ``[nodes]``.
    """

    tokens: np.ndarray
    positions: np.ndarray
    end: np.ndarray
    sizes: np.ndarray
    trunk_column: np.ndarray
    node_column: np.ndarray


def _padded(rows: int, length: int, multiple: int, together: int) -> tuple[int, int]:
    """The shape of the fewest tokens, and then of the fewest rows."""
    shapes = []
    for part in (part for part in range(1, together + 1) if together % part == 0):
        step = math.lcm(multiple, part)
        padded = -(-length // step) * step
        each = together // math.gcd(together, padded)
        shapes.append((-(-rows // each) * each, padded))
    return min(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))


def _lay_out(trunks: Ragged, branches: _Branches, multiple: int, together: int) -> _Layout:
    """Depth-first: branches at site ``p`` stand between the trunk's tokens ``p - 1`` and ``p``."""
    each = branches.fresh.sum(1)
    node_tree, node_site = np.repeat(branches.tree, each), np.repeat(branches.site, each)
    nodes_of_tree = np.bincount(node_tree, minlength=len(trunks))
    first_node = exclusive_cumsum(nodes_of_tree)
    sizes = trunks.lengths + nodes_of_tree
    rows, length = _padded(len(trunks), int(sizes.max(initial=1)), multiple, together)
    tokens = np.zeros((rows, length), np.int64)
    positions = np.zeros((rows, length), np.int64)
    end = np.tile(np.arange(1, length + 1), (rows, 1))

    # Before a trunk's token are the trunk's earlier ones, and the nodes of its site and earlier.
    trunk_tree = trunks.owner
    depth = places(trunks.lengths)
    span = length + 1  # one key for each tree and site, in order
    key, node_key = trunk_tree * span + depth, node_tree * span + node_site
    before = np.searchsorted(node_key, key, side="right") - first_node[trunk_tree]
    trunk_column = depth + before
    tokens[trunk_tree, trunk_column] = trunks.values
    positions[trunk_tree, trunk_column] = depth
    end[trunk_tree, trunk_column] = sizes[trunk_tree]

    # Before a node are the earlier nodes of its tree, and the trunk up to its site.
    shift = node_site - first_node[node_tree]
    node_column = np.arange(len(shift)) + shift
    _, depth_on_branch = np.nonzero(branches.fresh)
    tokens[node_tree, node_column] = branches.tokens[branches.fresh]
    positions[node_tree, node_column] = node_site + depth_on_branch
    end[node_tree, node_column] = branches.node_end + shift
    return _Layout(tokens, positions, end, sizes, trunk_column, node_column)


def _ask(
    layout: _Layout,
    trunks: Ragged,
    tree: np.ndarray,
    start: np.ndarray,
    follows: np.ndarray,
    branches: _Branches,
    responses: Ragged,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """``states``, and what the edges have of each attribute of :class:`Forest`.

    Each token of a response is predicted by the token before it, on the trunk or on a branch.
    """
    response = responses.owner
    step = places(responses.lengths)
    column = np.empty(len(response), np.int64)
    on_trunk = step <= follows[response]
    r, s = response[on_trunk], step[on_trunk]
    column[on_trunk] = layout.trunk_column[trunks.starts[tree[r]] + start[r] + s - 1]
    branch = np.full(len(responses), -1, np.int64)
    branch[branches.response] = np.arange(len(branches.response))
    r, s = response[~on_trunk], step[~on_trunk]
    column[~on_trunk] = layout.node_column[branches.node[branch[r], s - follows[r] - 1]]
    place = tree[response] * layout.tokens.shape[1] + column
    states, state = np.unique(place, return_inverse=True)
    order = np.argsort(state, kind="stable")
    return states, (state[order], responses.values[order], response[order], step[order])
