"""The ``scratch`` backbone: a small GPT-NeoX and a byte-level BPE, both made for one catalogue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

START = "<s>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, others: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Bytes, and the pieces that a byte-level BPE of at most ``vocab_size`` tokens cuts ``texts``
    into.

    A text that comes often weighs more, and merges may cross blanks and line breaks, so that a
    frequent title becomes a token, its line break included. Of BPE's tokens most are steps on the
    way to longer ones, which no text is made of; they are left out, for each costs a column of the
    vocabulary projection (on ml-100k four fifths of it). Text is cut into as few pieces as there
    can be.

    Where each of ``texts`` is one token, so is each of ``others``, until the vocabulary is full or
    twice as large. Spelled in bytes, a few of them would have a ranking of all project dozens of
    places in place of one; among ``texts`` they would take merges from what is trained on.
    """
    texts = list(texts)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
        ),
    )
    cut = [encoding.tokens for encoding in bpe.encode_batch(sorted(set(texts)))]
    pieces = [START, *alphabet, *sorted(set(chain.from_iterable(cut)) - set(alphabet))]
    if all(len(tokens) == 1 for tokens in cut):
        whole = ("".join(encoding.tokens) for encoding in bpe.encode_batch(list(others)))
        pieces = list(dict.fromkeys([*pieces, *whole]))[: min(vocab_size, 2 * len(pieces))]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = bpe.pre_tokenizer, decoders.ByteLevel()
    tokenizer.add_special_tokens([START])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=START,
        pad_token=START,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    vocab_size: int, hidden_size: int, layers: int, heads: int, dropout: float, seed: int
) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with random weights, rotary positions and tied embeddings.

    Of the small decoders in ``transformers`` it has dropout where sequential recommenders have it:
    after the embeddings, in the attention and after each half of a layer.
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
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config)
