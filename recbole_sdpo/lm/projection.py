"""From hidden states to log-probabilities of tokens, without ever holding all logits."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

LOGITS_AT_ONCE = (2**22, 2**26)
"""Largest number of logits held at a time, on a CPU (16 MiB in float32, near its caches) and on
a GPU."""

STATES = 16
"""In bfloat16 on a CPU, states are taken by multiples of this, for oneDNN makes and keeps a
program for each shape of a matrix."""


def token_logps(
    model: PreTrainedModel,
    hidden: Tensor,
    edge_state: Tensor,
    edge_token: Tensor,
    first_edge: np.ndarray | None = None,
) -> Tensor:
    """log pi of ``edge_token[e]`` after ``hidden[edge_state[e]]``, float32 ``[E]`` (float64 for a
    float64 model).

    Args:
        hidden: ``[S, H]``, the last hidden states of the tokens that predict, each once.
        edge_state: int64 ``[E]``, increasing.
        edge_token: int64 ``[E]``.
        first_edge: int64 ``[S + 1]``, each state's first edge, and ``E``; where it is not given, a
            GPU is waited for to tell.
    """
    if first_edge is None:
        every = torch.arange(len(hidden) + 1, device=hidden.device)
        first_edge = torch.searchsorted(edge_state, every).cpu().numpy()
    if missing := -len(hidden) % _together(hidden):  # states that nothing leaves
        hidden, first_edge = (
            F.pad(hidden, (0, 0, 0, missing)),
            np.pad(first_edge, (0, missing), mode="edge"),
        )
    # Autograd hands gradients only to what is an argument of apply: so are these.
    trained = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    return _TokenLogps.apply(
        partial(_to_logits, model), first_edge, hidden, edge_state, edge_token, *trained
    )


def next_logps(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """log pi of every token after the given last hidden states ``[N, H]``, ``[N, vocabulary]`` in
    float32 or more; for so few of them as :func:`rows_at_once` says."""
    padded = F.pad(hidden, (0, 0, 0, -len(hidden) % _together(hidden)))
    return _to_logits(model, padded)[: len(hidden)].log_softmax(-1)


def rows_at_once(model: PreTrainedModel, hidden: Tensor) -> int:
    """Of how many of the states ``hidden`` the logits may be held at a time."""
    together = _together(hidden)
    logits = together * model.config.get_text_config().vocab_size
    return max(1, LOGITS_AT_ONCE[hidden.device.type == "cuda"] // logits) * together


class _TokenLogps(torch.autograd.Function):
    """log pi of ``edge_token[e]`` after ``hidden[edge_state[e]]``, without ever holding all logits.

    Each state goes through the vocabulary projection once, in chunks; backward computes a chunk's
    logits again, and from them their gradient, softmax and one-hot.
    """

    @staticmethod
    def forward(
        ctx,
        logits_of: partial,
        first_edge: np.ndarray,
        hidden: Tensor,
        edge_state: Tensor,
        edge_token: Tensor,
        *trained: nn.Parameter,
    ) -> Tensor:
        chosen, normalizer = [], []
        for rows, edges in _chunks(hidden, first_edge, logits_of):
            logits = logits_of(hidden[rows])
            normalizer.append(logits.logsumexp(-1))
            chosen.append(logits[edge_state[edges] - rows.start, edge_token[edges]])
        total = torch.cat(normalizer)
        ctx.logits_of, ctx.first_edge, ctx.arithmetic = (
            logits_of,
            first_edge,
            _arithmetic_here(hidden.device),
        )
        ctx.save_for_backward(hidden, edge_state, edge_token, *trained)
        return torch.cat(chosen) - total[edge_state]

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, edge_state, edge_token, *trained = ctx.saved_tensors
        # The gradient of log pi(token) by the logits is one-hot less softmax. The edges of a state
        # share the softmax, so that their gradients are summed before it is taken.
        # Not index_add_, which on a GPU adds in whatever order.
        weight = grad_output.new_zeros(len(hidden)).index_put_(
            (edge_state,), grad_output, accumulate=True
        )
        grad_hidden = torch.empty_like(hidden)
        grad_trained = [torch.zeros_like(p) for p in trained]
        with ctx.arithmetic:  # of the forward pass, in which autograd does not run this
            chunks = _chunks(hidden, ctx.first_edge, ctx.logits_of)
        for rows, edges in chunks:
            with torch.enable_grad(), ctx.arithmetic:
                part = hidden[rows].detach().requires_grad_()
                logits = ctx.logits_of(part)
            grad = logits.detach().softmax(-1).mul_(-weight[rows, None])
            grad.index_put_(
                (edge_state[edges] - rows.start, edge_token[edges]),
                grad_output[edges],
                accumulate=True,
            )
            grad_hidden[rows], *parts = torch.autograd.grad(logits, [part, *trained], grad)
            for sum_so_far, new in zip(grad_trained, parts, strict=True):
                sum_so_far += new
        return None, None, grad_hidden, None, None, *grad_trained


def _chunks(
    hidden: Tensor, first_edge: np.ndarray, logits_of: partial
) -> list[tuple[slice, slice]]:
    """Cuts of the states, and of the edges that leave them, with a bounded number of logits
    each."""
    (model,) = logits_of.args
    bounds = [*range(0, len(hidden), rows_at_once(model, hidden)), len(hidden)]
    # Edges stand in the order of their states, so that a cut of the states is one of the edges.
    edges = first_edge[bounds].tolist()
    return [
        (slice(low, high), slice(first, last))
        for low, high, first, last in zip(bounds, bounds[1:], edges, edges[1:], strict=False)
    ]


def _arithmetic_here(device: torch.device) -> torch.autocast:
    """The autocast that is on now, to be entered later."""
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )


def _together(hidden: Tensor) -> int:
    """States of which all but the last chunk hold a multiple."""
    bf16 = hidden.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return STATES if bf16 and hidden.device.type == "cpu" else 1


def _to_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's logits of the given last hidden states, in float32 or more."""
    raw = model.get_output_embeddings()(hidden)
    raw = raw if raw.dtype == torch.float64 else raw.float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return raw if cap is None else cap * torch.tanh(raw / cap)
