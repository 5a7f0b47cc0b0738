"""How a decoder attends to a forest: :func:`attention_inputs` chooses among three ways, all exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.forest import Forest

FLEX = "flex_attention"

FLEX_FROM = 1024
"""Row length from which ``auto`` takes FlexAttention on a GPU. A dense mask costs the square of it in every layer. An
estimate: no GPU was at hand to measure it."""


def attention_inputs(model: PreTrainedModel, forest: Forest, choice: str) -> dict[str, object]:
    """The decoder's arguments that make each token of ``forest`` attend to its ancestors only.

    * A forest of chains is plain causal attention at positions 0, 1, 2, …, which needs neither mask nor positions.
    * FlexAttention takes a block mask made from ``j <= i < end[j]``, and skips the blocks in which nobody sees anybody.
    * SDPA and eager take a dense additive mask.

    Args:
        model: a causal language model; its attention implementation is set to the one chosen.
        choice: ``sdpa``, ``eager``, ``flex_attention``, or ``auto``; checked by :func:`check_attention` before.
    """
    if forest.chains:
        set_attention(model, dense_implementation(model, choice))
        return {}
    long = model.device.type == "cuda" and forest.tokens.shape[1] >= FLEX_FROM
    if choice == FLEX or (choice == "auto" and long and not _why_no_flex(model)):
        set_attention(model, FLEX)
        make = _block_mask
    else:
        set_attention(model, dense_implementation(model, choice))
        make = _dense_mask
    return {"attention_mask": for_each_kind(model, lambda window: make(model, forest, window)), "position_ids": forest.positions}


def check_attention(model: PreTrainedModel, choice: str) -> None:
    """May the model attend that way?

    Raises:
        UserError: it may not, or it would leave out something without a word.
    """
    if choice == "sdpa" and _soft_capped(model):
        kind = model.config.get_text_config().model_type
        raise UserError(f"attention='sdpa' leaves out the soft cap of {kind!r}; it must be auto or eager.")
    if choice == FLEX and (reason := _why_no_flex(model)):
        raise UserError(f"attention={FLEX!r} is not for this run: {reason}; it must be auto, sdpa or eager.")


def dense_implementation(model: PreTrainedModel, choice: str) -> str:
    """The implementation that takes a dense mask: SDPA, or eager where asked for or where SDPA would not do."""
    return "eager" if choice == "eager" or _soft_capped(model) or not model._supports_sdpa else "sdpa"


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set the model's attention implementation, if it is another one."""
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``visible``, the lowest number elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def for_each_kind(model: PreTrainedModel, mask: Callable[[int | None], object]) -> object:
    """``mask(window)`` for the model's layers; by kind of layer where full and sliding attention take turns.

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
    """``[B, 1, L, L]`` in the model's dtype."""
    return additive(forest.attention(window)[:, None], model.dtype)


def _block_mask(model: PreTrainedModel, forest: Forest, window: int | None) -> BlockMask:
    end, positions = forest.end, forest.positions

    def visible(row, head, i, j):
        seen = (j <= i) & (i < end[row, j])
        return seen if window is None else seen & (positions[row, i] - positions[row, j] < window)

    rows, length = forest.tokens.shape
    return create_block_mask(visible, rows, None, length, length, device=forest.tokens.device)
