"""The prefix forest: a batch of prompts and responses in which every distinct prefix is one token.

Each tree has a **trunk** (a prompt, or a whole history of which every prefix is a prompt) and **branches** (responses
that leave the trunk somewhere). Branches follow the trunk and each other for as long as their tokens agree. A tree is
laid out depth-first, so that token ``j`` is an ancestor of ``i``, or ``i`` itself, exactly when ``j <= i < end[j]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from recbole_sdpo.errors import UserError
from recbole_sdpo.ragged import Ragged, exclusive_cumsum, steps


@dataclass(frozen=True)
class Forest:
    """``B`` trees, one to a row, and what is asked of them: the log-probabilities of ``R`` responses.

    Attributes:
        tokens: int64 ``[B, L]``, right-padded with 0.
        positions: int64 ``[B, L]``, the depth of each token in its tree, which is its position in its sequence.
        end: int64 ``[B, L]``, one past the column of the last descendant; padding sees only itself.
        states: int64 ``[S]``, increasing indices into the flattened ``B * L`` of the distinct tokens that predict.
        edge_state: int64 ``[E]``, increasing: for each predicted token the entry of ``states`` that predicts it.
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

    def pin_memory(self) -> Forest:
        """The same forest in memory from which a GPU copies while the host goes on."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, move: Callable[[Tensor], Tensor]) -> Forest:
        return replace(self, **{f.name: move(part) for f in fields(self) if isinstance(part := getattr(self, f.name), Tensor)})

    def attention(self, window: int | None = None) -> Tensor:
        """bool ``[B, L, L]``: may token ``i`` (dim 1) attend to ``j`` (dim 2)?

        Args:
            window: for layers with sliding attention, the number of positions that a token sees, itself included.
        """
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        visible = (column <= column[:, None]) & (column[:, None] < self.end[:, None, :])
        if window is not None:
            visible &= self.positions[:, :, None] - self.positions[:, None, :] < window
        return visible

    def sum_by_response(self, logps: Tensor) -> Tensor:
        """Sums over the tokens of each response, ``[…, R]``, of what belongs to the edges, ``[…, E]``."""
        # Each token has a place of its own, so that the sum has one order on every device.
        table = logps.new_zeros(*logps.shape[:-1], self.responses, self.steps)
        table[..., self.edge_response, self.edge_step] = logps
        return table.sum(-1)


def plant(trunks: Ragged, tree: np.ndarray, start: np.ndarray, responses: Ragged, multiple: int = 1) -> Forest:
    """Build the forest of the given trunks and responses.

    Args:
        trunks: the tokens of each of the ``B`` trunks.
        tree: int ``[R]``, the trunk of each response.
        start: int ``[R]``, how many of its trunk's tokens are the response's prompt, at least 1.
        responses: the tokens of each of the ``R`` responses, none empty.
        multiple: the length of the rows is padded to a multiple of it.

    Raises:
        UserError: a response is empty, or its prompt is empty or longer than its trunk.
    """
    tree, start = np.asarray(tree, np.int64), np.asarray(start, np.int64)
    if responses.lengths.min(initial=1) < 1:
        raise UserError(f"response {responses.lengths.argmin()} has no token; each needs at least one.")
    if len(start) and (start.min() < 1 or (start > trunks.lengths[tree]).any()):
        bad = int(np.argmax((start < 1) | (start > trunks.lengths[tree])))
        raise UserError(
            f"response {bad} starts after {start[bad]} tokens of a trunk of {trunks.lengths[tree[bad]]}; "
            "it must be 1 to the trunk's length."
        )
    # A response's last token is predicted but predicts nothing, so it needs no place in the forest.
    wanted, inner = responses.padded(-1), responses.lengths - 1
    depth = np.arange(wanted.shape[1])

    # How far does each response follow its trunk?
    ahead = start[:, None] + depth
    inside = ahead < trunks.lengths[tree][:, None]
    following = np.where(inside, trunks.values[np.where(inside, trunks.starts[tree][:, None] + ahead, 0)], -2)
    follows = np.logical_and.accumulate(wanted == following, axis=1).sum(1)
    shared = np.minimum(follows, inner)
    leaves_at = start + follows

    # The rest of each response is a branch. Sorted, a branch shares a prefix with its predecessor or with none.
    branching = np.flatnonzero(inner > follows)
    width = int((inner - follows).max(initial=0))
    rest_length = (inner - follows)[branching]
    column = np.arange(width)
    taken = follows[branching, None] + column
    rest = np.where(
        column < rest_length[:, None],
        np.take_along_axis(wanted[branching], np.minimum(taken, wanted.shape[1] - 1), 1),
        -1,
    )
    order = np.lexsort((*rest.T[::-1], leaves_at[branching], tree[branching]))
    branching, rest, rest_length = branching[order], rest[order], rest_length[order]
    site = np.stack([tree[branching], leaves_at[branching]])
    lcp = np.zeros(len(branching), np.int64)
    if len(branching) > 1:
        agree = np.logical_and.accumulate(rest[1:] == rest[:-1], axis=1).sum(1)
        same_site = (site[:, 1:] == site[:, :-1]).all(0)
        lcp[1:] = np.where(same_site, np.minimum(agree, np.minimum(rest_length[1:], rest_length[:-1])), 0)
    fresh = rest_length - lcp
    first = exclusive_cumsum(fresh)
    is_new = (column >= lcp[:, None]) & (column < rest_length[:, None])
    node = np.maximum.accumulate(np.where(is_new, first[:, None] + column - lcp[:, None], -1), axis=0)

    # A branch token's subtree ends where a later branch parts from it at its depth or before.
    branch_nodes = int(fresh.sum())
    parts = np.where(lcp[:, None] <= column, first[:, None], branch_nodes)
    parts = np.vstack([parts, np.full((1, width), branch_nodes)])
    subtree_end = np.minimum.accumulate(parts[::-1], axis=0)[::-1][1:]

    # Depth-first layout: the branches that leave the trunk at p stand between trunk tokens p - 1 and p.
    trees = len(trunks)
    kept = np.zeros(trees, np.int64)
    np.maximum.at(kept, tree, start + shared)
    np.maximum.at(kept, tree[branching], leaves_at[branching])
    node_row, node_site = np.repeat(site[0], fresh), np.repeat(site[1], fresh)
    branch_total = np.bincount(node_row, minlength=trees)
    before_tree = exclusive_cumsum(branch_total)
    sizes = kept + branch_total
    length = -(-int(sizes.max(initial=1)) // multiple) * multiple
    tokens = np.zeros((trees, length), np.int64)
    positions = np.zeros((trees, length), np.int64)
    end = np.tile(np.arange(1, length + 1), (trees, 1))

    trunk_row = np.repeat(np.arange(trees), kept)
    trunk_depth = steps(kept)
    span = length + 1  # one key per (tree, site), in order
    trunk_column = trunk_depth + (
        np.searchsorted(node_row * span + node_site, trunk_row * span + trunk_depth, side="right") - before_tree[trunk_row]
    )
    tokens[trunk_row, trunk_column] = trunks.values[trunks.starts[trunk_row] + trunk_depth]
    positions[trunk_row, trunk_column] = trunk_depth
    end[trunk_row, trunk_column] = sizes[trunk_row]

    to_column = node_site - before_tree[node_row]  # from a branch token's number to its column
    node_column = np.arange(branch_nodes) + to_column
    tokens[node_row, node_column] = rest[is_new]
    positions[node_row, node_column] = node_site + np.broadcast_to(column, rest.shape)[is_new]
    end[node_row, node_column] = subtree_end[is_new] + to_column

    # Each response token is predicted by the token before it, on the trunk or on the branch.
    branch_of = np.full(len(responses), -1, np.int64)
    branch_of[branching] = np.arange(len(branching))
    response, step = np.nonzero(depth < responses.lengths[:, None])
    on_trunk = step <= follows[response]
    trunk_offset = exclusive_cumsum(kept)
    predictor = np.empty(len(response), np.int64)
    r, s = response[on_trunk], step[on_trunk]
    predictor[on_trunk] = trunk_column[trunk_offset[tree[r]] + start[r] + s - 1]
    r, s = response[~on_trunk], step[~on_trunk]
    predictor[~on_trunk] = node_column[node[branch_of[r], s - follows[r] - 1]]
    states, edge_state = np.unique(tree[response] * length + predictor, return_inverse=True)
    order = np.argsort(edge_state, kind="stable")
    edges = (edge_state[order], responses.values[order], response[order], step[order])

    return Forest(
        *map(torch.from_numpy, (tokens, positions, end, states, *edges)),
        first_edge=np.searchsorted(edges[0], np.arange(len(states) + 1)),
        steps=int(responses.lengths.max(initial=0)),
        responses=len(responses),
        chains=branch_nodes == 0,
        size=int(sizes.sum()),
    )
