"""Small, real inputs: a dataset, settings under which a run takes about a second, a backbone."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

USERS, EVENTS, ITEMS = 24, 8, 24

WORDS, SHAPES = ["red", "green", "blue", "black", "white", "grey"], ["cube", "ball", "cone", "ring"]

RUN: dict[str, Any] = {
    "backbone": "scratch",
    "scratch_hidden_size": 16,
    "scratch_layers": 1,
    "scratch_heads": 2,
    "scratch_vocab_size": 300,
    "show_progress": False,
    "MAX_ITEM_LIST_LENGTH": 6,
    "eval_args": {"mode": "uni5"},
    "train_neg_sample_args": {"sample_num": 2},
    "topk": [1, 5],
    "sft_epochs": 2,
    "sft_learning_rate": 3e-3,
    "sdpo_epochs": 2,
    "sdpo_learning_rate": 3e-3,
    "save_minutes": 0,
}
"""Of SDPO-LLM."""

BASELINE: dict[str, Any] = {
    "show_progress": False,
    "MAX_ITEM_LIST_LENGTH": 6,
    "eval_args": {"mode": "uni5"},
    "topk": [1, 5],
    "epochs": 2,
    "train_batch_size": 64,
}
"""Of a model of RecBole's."""


def settings(model: str, **other: Any) -> dict[str, Any]:
    """Those of a toy run of ``model``."""
    return copy.deepcopy(RUN if model == "SDPO-LLM" else BASELINE) | other


def rows(seed: int = 0) -> list[tuple[str, str, str]]:
    """User, item and time of each event, in the order of the file; no user has a time or item
    twice."""
    draw = random.Random(f"toy {seed}")
    events = []
    for user in range(USERS):
        first = draw.randrange(ITEMS)
        for step in range(EVENTS):
            events.append(
                (f"u{user}", f"i{(first + step) % ITEMS}", f"{1_000_000_000 + 1000 * step + user}")
            )
    draw.shuffle(events)
    return events


def titles() -> dict[str, str]:
    """Of each item."""
    return {f"i{item}": f"{WORDS[item % 6]} {SHAPES[item // 6]}" for item in range(ITEMS)}


def write(folder: Path, name: str = "toy", seed: int = 0) -> Path:
    """The atomic files of the dataset; returns the ``data_path`` for RecBole."""
    place = folder / name
    place.mkdir(parents=True)
    events = ["user_id:token\titem_id:token\ttimestamp:float", *map("\t".join, rows(seed))]
    items = ["item_id:token\ttitle:token_seq", *map("\t".join, titles().items())]
    for end, lines in (("inter", events), ("item", items)):
        (place / f"{name}.{end}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def backbone(folder: Path) -> None:
    """A Llama of two layers with a byte-level tokenizer, as ``transformers`` saves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*titles().values()] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="<s>", pad_token="<s>"
    )
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
