"""The ``scratch`` backbone: a small GPT-NeoX and a byte-level BPE, both made for one catalogue."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

START = "<s>"


def train_tokenizer(titles: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab_size`` tokens, trained on ``titles``; a title that comes often weighs more.

    Merges may cross blanks, so that a frequent title becomes a token or two: on ml-100k a title then costs a third of the
    tokens that word-bound merges give. Any other text still has its bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(titles, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=START,
        pad_token=START,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int, hidden_size: int, layers: int, heads: int, dropout: float, seed: int) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with random weights, rotary positions and tied embeddings.

    Of the small decoders in ``transformers`` it has dropout where sequential recommenders have it: after the embeddings, in
    the attention and after each half of a layer.
    """
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config)
