"""Writing an answer to a prompt: greedy decoding, of any text or only of what is among given
responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from recbole_sdpo.lm.attention import dense_implementation, set_attention
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.parts import is_parted
from recbole_sdpo.lm.text import line_breaks
from recbole_sdpo.ragged import Ragged

NOTHING = -1
"""Fills the answers that are shorter than others."""

Trie = dict[int, "Trie"]


@torch.no_grad()
def write(
    lm: LanguageModel,
    prompts: Ragged,
    limit: int,
    ends: Sequence[int],
    among: Sequence[Ragged] | None = None,
) -> np.ndarray:
    """The policy's greedy answers, int64 ``[rows, limit]``, each up to and with a token of ``ends``
    and then :data:`NOTHING`.

    The prompts are padded on the left, and keys and values are kept from token to token; nothing
    that the backbone's own files say about decoding (a repetition penalty, sampling) has a part in
    it.

    Args:
        prompts: token ids.
        limit: tokens of an answer at most.
        ends: the tokens that end one.
        among: for each prompt the responses of which its answer shall be one, each of them closed
            by a token of ``ends``; None for any text.
    """
    model, width = lm.causal_lm, int(prompts.lengths.max())
    set_attention(model, dense_implementation(model, lm.attention))
    # Where each token ends an answer, any may stand in what is masked, or after an end.
    rows, closing = model.get_input_embeddings().weight.shape[0], set(ends)
    padding = next((token for token in range(rows) if token not in closing), 0)
    tokens = torch.full((len(prompts), width), padding, device=lm.device)
    seen = torch.arange(width) >= width - torch.from_numpy(prompts.lengths)[:, None]
    tokens[seen] = torch.from_numpy(prompts.values).to(lm.device)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=limit,
        eos_token_id=list(ends),
        pad_token_id=padding,
    )
    only = only_among(list(map(trie, among)), width, padding) if among is not None else None
    training = lm.training
    lm.eval()
    try:
        with lm.arithmetic():
            answers = model.generate(
                tokens,
                attention_mask=seen.long().to(lm.device),
                generation_config=settings,
                prefix_allowed_tokens_fn=only,
                synced_gpus=is_parted(model),
            )
    finally:
        lm.train(training)
    return _after_end(answers[:, width:].cpu().numpy(), ends, limit)


def trie(responses: Ragged) -> Trie:
    """The responses as nested dictionaries of tokens."""
    root: Trie = {}
    for row in np.split(responses.values, np.cumsum(responses.lengths)[:-1]):
        node = root
        for token in row.tolist():
            node = node.setdefault(token, {})
    return root


def only_among(
    tries: Sequence[Trie], width: int, padding: int
) -> Callable[[int, Tensor], list[int]]:
    """Which tokens may come next, as ``generate`` asks for it: those that go on in the row's
    trie after ``width`` tokens of prompt."""

    def allowed(row: int, tokens: Tensor) -> list[int]:
        node = tries[row]
        for token in tokens[width:].tolist():
            node = node.get(token, {})
        return list(node) or [padding]

    return allowed


def line_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with a line break in them, and the tokenizer's own end of text."""
    return sorted(
        line_breaks(tokenizer, range(len(tokenizer))) | ({tokenizer.eos_token_id} - {None})
    )


def _after_end(answers: np.ndarray, ends: Sequence[int], limit: int) -> np.ndarray:
    ended = np.isin(answers, ends)
    before = np.cumsum(ended, axis=1) - ended > 0
    lines = np.full((len(answers), limit), NOTHING, np.int64)
    lines[:, : answers.shape[1]] = np.where(before, NOTHING, answers)
    return lines
