"""The plain way: for each response one full right-padded sequence, policy and reference, all
logits.

This is what the usual preference trainer does for a pair, generalised to K negatives. It shares
nothing with the forest but the model, the tokens of prompts and titles, and the loss.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recbole_sdpo.data.prompts import Prompts
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.objectives import Constants, Logps, sdpo


def some_targets(prompts: Prompts, items: np.ndarray, number: int) -> tuple[Prompts, np.ndarray]:
    """So many of a batch's targets, drawn, or all: their prompts, and their rows of ``items``."""
    few = np.random.default_rng(1).permutation(len(items))[:number]
    before, target, user = prompts.before[few], prompts.target[few], prompts.user[few]
    return Prompts(prompts.trunks, prompts.tree[few], before, target, user), items[few]


def sequences(
    recommender: SDPOLLM, prompts: Prompts, items: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The tokens of each target's prompt, and of the titles of ``items [T, C]``, T times C of
    them."""
    tokens = recommender.encoder.tokens
    asked = zip(prompts.tree, prompts.before, strict=True)
    texts = [
        np.concatenate([tokens[unit] for unit in prompts.trunks[tree][:before]])
        for tree, before in asked
    ]
    return texts, [tokens[item] for item in items.ravel()]


def sequence_logps(
    model: PreTrainedModel, prompts: list[np.ndarray], titles: list[np.ndarray]
) -> Tensor:
    """log pi of each title after its prompt, ``[len(titles)]``, in one batch."""
    rows = [np.concatenate([prompt, title]) for prompt, title in zip(prompts, titles, strict=True)]
    width, device = max(map(len, rows)), model.device
    ids = torch.tensor(np.stack([np.pad(row, (0, width - len(row))) for row in rows])).to(device)
    length, start = (torch.tensor([len(row) for row in of]).to(device) for of in (rows, prompts))
    place = torch.arange(width, device=device)
    mask = (place < length[:, None]).long()
    logps = (
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        .logits[:, :-1]
        .float()
        .log_softmax(-1)
    )
    picked = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (picked * ((place[1:] >= start[:, None]) & mask[:, 1:].bool())).sum(-1)


def score(
    model: PreTrainedModel,
    recommender: SDPOLLM,
    prompts: Prompts,
    items: np.ndarray,
    at_once: int = 64,
) -> Tensor:
    """log pi of ``items [T, C]``, ``[T, C]``, so many sequences in a batch."""
    texts, titles = sequences(recommender, prompts, items)
    texts = [text for text in texts for _ in range(items.shape[1])]
    cuts = range(0, len(titles), at_once)
    return torch.cat(
        [sequence_logps(model, texts[i : i + at_once], titles[i : i + at_once]) for i in cuts]
    ).view(items.shape)


def logps(recommender: SDPOLLM, prompts: Prompts, items: np.ndarray) -> Logps:
    """Of policy and reference, as :meth:`SDPOLLM.forward` gives them."""
    everything = items.size
    policy = score(recommender.lm.causal_lm, recommender, prompts, items, everything)
    with torch.no_grad(), recommender.lm.reference() as model:
        reference = score(model, recommender, prompts, items, everything)
    _, titles = sequences(recommender, prompts, items)
    return Logps.of(policy, reference, policy.new_tensor([*map(len, titles)]).view(items.shape))


def sdpo_loss(recommender: SDPOLLM, prompts: Prompts, items: np.ndarray) -> Tensor:
    """The mean S-DPO loss, with beta 1, ``[]``."""
    return sdpo(logps(recommender, prompts, items), Constants()).mean()


def sequence_tokens(recommender: SDPOLLM, prompts: Prompts, items: np.ndarray) -> int:
    """Tokens in the padded batch of all sequences."""
    texts, titles = sequences(recommender, prompts, items)
    return len(titles) * max(
        len(texts[i // items.shape[1]]) + len(title) for i, title in enumerate(titles)
    )
