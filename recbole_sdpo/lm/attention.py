"""How a decoder attends to a forest: :func:`attention_inputs` chooses among three ways, all
exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.forest import Forest

FLEX = "flex_attention"

FLEX_FROM = 16384
"""Row length from which ``auto`` takes FlexAttention on a GPU: in bfloat16 a dense mask of a row so
long takes 0.5 GiB.

Below, a dense mask is faster: on an H200, with rows of 880 to 9,328 tokens, a step of SmolLM2 took
244 to 265 ms with it, and 288 to 326 ms with FlexAttention (results/gpu).
"""

EAGER_UP_TO = 256
"""Row length up to which ``auto`` takes eager attention on a CPU in bfloat16.

There SDPA's backward pass has a cost for each row and head: with 48 rows of 24 tokens, 9 heads and
one thread (AMX) it took 42 ms and eager attention 6.5 ms; with 8 rows of 128 27 and 9; with 2 rows
of 512 31 and 37.
"""

BLOCK = 128
"""Tokens to a side of FlexAttention's blocks."""


def attention_inputs(
    model: PreTrainedModel, forest: Forest, choice: str
) -> tuple[str, dict[str, object]]:
    """An implementation of attention, and the decoder's arguments with which each token of
    ``forest`` attends to its ancestors only.

    * A forest of chains is plain causal attention at positions 0, 1, 2, …, which needs neither mask
      nor, within :func:`positions`, these.
    * FlexAttention takes a block mask made from ``j <= i < end[j]``, and skips the blocks in which
      nobody sees anybody.
    * SDPA and eager take a dense additive mask. Short rows in bfloat16 are faster eager on a CPU.

    Args:
        model: a causal language model.
        choice: ``sdpa``, ``eager``, ``flex_attention``, or ``auto``; checked by
            :func:`check_attention` before.
    """
    dense = dense_implementation(model, choice)
    short = forest.tokens.shape[1] <= EAGER_UP_TO
    if choice == "auto" and short and _in_bf16_on_a_cpu(model, forest):
        dense = "eager"
    if forest.chains:
        limit, hard = positions(model)
        if hard and limit and forest.tokens.shape[1] > limit:
            return dense, {"position_ids": forest.positions}  # else padding would run past them
        return dense, {}
    long = forest.tokens.device.type == "cuda" and forest.tokens.shape[1] >= FLEX_FROM
    flex = choice == FLEX or (choice == "auto" and long and not _why_no_flex(model))
    make = _block_mask if flex else _dense_mask
    masks = for_each_kind(model, lambda window: make(model, forest, window))
    return FLEX if flex else dense, {"attention_mask": masks, "position_ids": forest.positions}


def positions(model: PreTrainedModel) -> tuple[int | None, bool]:
    """For how many positions the model was made, None if it does not say; and can nothing have
    more?

    Learned positions end there. The angles of LongRoPE and "dynamic" follow the longest text of a
    batch beyond theirs, which changes the scores of the others. Other rotary ones get worse.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    varying = [
        kind.get("original_max_position_embeddings") or limit
        for kind in (rotary, *rotary.values())  # one for all layers, or one for each kind
        if isinstance(kind, dict) and kind.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(filter(None, varying), default=limit), bool(varying) or not rotary


def check_attention(model: PreTrainedModel, choice: str) -> None:
    """May the model attend that way?

    Raises:
        UserError: it may not, or it would leave out something without a word.
    """
    if choice == "sdpa" and _soft_capped(model):
        kind = model.config.get_text_config().model_type
        raise UserError(
            f"attention='sdpa' leaves out the soft cap of {kind!r}; it must be auto or eager."
        )
    if choice == FLEX and (reason := _why_no_flex(model)):
        raise UserError(
            f"attention={FLEX!r} is not for this run: {reason}; it must be auto, sdpa or eager."
        )


def dense_implementation(model: PreTrainedModel, choice: str) -> str:
    """The implementation that takes a dense mask: SDPA, or eager where asked for or where SDPA
    would not do."""
    return (
        "eager" if choice == "eager" or _soft_capped(model) or not model._supports_sdpa else "sdpa"
    )


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set the model's attention implementation, if it is another one."""
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``visible``, the lowest number elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def for_each_kind(model: PreTrainedModel, mask: Callable[[int | None], object]) -> object:
    """``mask(window)`` for the model's layers; by kind of layer where full and sliding attention
    take turns.

    Args:
        mask: from a sliding window in tokens, or None for full attention, to a mask.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return mask(window)
    windows = {"full_attention": None, "sliding_attention": window}
    return {kind: mask(windows[kind]) for kind in kinds}


def _soft_capped(model: PreTrainedModel) -> bool:
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def _why_no_flex(model: PreTrainedModel) -> str | None:
    if not model._supports_flex_attn:
        return f"transformers has none for {model.config.model_type!r}"
    if getattr(model.config.get_text_config(), "attention_dropout", 0):
        return "it has no dropout, and the backbone's attention has"
    return None


def _dense_mask(model: PreTrainedModel, forest: Forest, window: int | None) -> Tensor:
    """``[B, 1, L, L]`` in the dtype that the model computes in."""
    return additive(forest.attention(window)[:, None], _dtype(model, forest))


def _dtype(model: PreTrainedModel, forest: Forest) -> torch.dtype:
    """That the model computes in here, where the forest is; its weights may be elsewhere."""
    kind = forest.tokens.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def _in_bf16_on_a_cpu(model: PreTrainedModel, forest: Forest) -> bool:
    return forest.tokens.device.type == "cpu" and _dtype(model, forest) == torch.bfloat16


def _block_mask(model: PreTrainedModel, forest: Forest, window: int | None) -> BlockMask:
    """FlexAttention's mask; without a window which blocks are seen, and which wholly, follows from
    ``end`` alone.

    That is what ``create_block_mask`` finds by looking at every pair of tokens, of which 8 rows of
    2,048 take 268 MB at a time.
    """
    end, positions = forest.end, forest.positions

    def visible(row, head, i, j):
        seen = (j <= i) & (i < end[row, j])
        return seen if window is None else seen & (positions[row, i] - positions[row, j] < window)

    rows, length = forest.tokens.shape
    if window is not None:
        return create_block_mask(
            visible, rows, None, length, length, device=end.device, BLOCK_SIZE=BLOCK
        )
    count = -(-length // BLOCK)
    # what is beyond the row is seen by none
    ends = F.pad(end, (0, count * BLOCK - length)).view(rows, count, BLOCK)
    number = torch.arange(count, device=end.device)
    first = number * BLOCK
    seen = (number <= number[:, None]) & (ends.amax(2)[:, None] > first[:, None])
    full = (number < number[:, None]) & (ends.amin(2)[:, None] >= first[:, None] + BLOCK)
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _listed(which: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row of blocks are marked, int32 ``[B, 1, Q]``, and their numbers first,
    int32 ``[B, 1, Q, K]``."""
    order = which.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return which.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
