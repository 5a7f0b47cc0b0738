"""How many tokens of a forest a device takes at a time."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

KEPT = 80
"""Bytes that a training step takes for each token, layer and unit of a layer's width, with some to
spare: for SmolLM2 on an H200 it was 53 in bfloat16 under adapters, and 69 with all weights trained
(results/gpu)."""

ON_A_CPU = 1024, 8192
"""Tokens at a time in training and in scoring: more are no faster there."""

LEAST, MOST = 1024, 16384
"""Tokens at a time in training on a GPU; with fewer than the latter it waits for the host
(results/gpu)."""


def tokens_at_once(model: PreTrainedModel, device: torch.device) -> tuple[int, int]:
    """Tokens of a ``model`` at a time in training and in scoring that suit ``device``, powers of
    two."""
    if device.type != "cuda":
        return ON_A_CPU
    config = model.config.get_text_config()
    # All of the GPU's memory, not what is free now, so that an interrupted run finds the same; half
    # of it is for weights and the rest.
    room = torch.cuda.get_device_properties(device).total_memory / 2
    fit = int(room / (KEPT * config.hidden_size * config.num_hidden_layers))
    training = min(max(1 << fit.bit_length() >> 1, LEAST), MOST)
    return training, 4 * training
