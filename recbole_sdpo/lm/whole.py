"""Titles as tokens: a vocabulary in which each text of the prompts is one token.

A title of eight pieces is eight tokens to a pretrained model, in every history and for every
negative. Here it is one. Its embedding begins as the mean of those of its pieces, so that words
still say where a title belongs, also one that training never met::

    pieces    T oy  ␣Story  ␣( 1 9 9 5 )⏎      8 columns of the backbone's vocabulary
    whole     Toy Story (1995)⏎                 1 column, their mean, and trained from there

The vocabulary is these texts alone, so that log pi is a softmax over titles and the few texts that
stand around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recbole_sdpo.lm.parts import own
from recbole_sdpo.lm.text import encode_texts, opening_tokens

CONTROL = "\t"
"""Begins the name of a control token: no title holds a tab, so that none can be one."""

UNKNOWN = f"{CONTROL}unknown"


class TitleHead(nn.Linear):
    """Logits of titles in the dtype of its weights, whatever ``torch.autocast`` says.

    A logit of 10 has steps of 0.06 in bfloat16: the titles that suit a history best would tie.
    """

    @classmethod
    def of(cls, head: nn.Linear) -> TitleHead:
        """With the weights of ``head``, of which an embedding may be one."""
        new = cls(head.in_features, head.out_features, head.bias is not None, "meta")
        new.weight, new.bias = head.weight, head.bias
        return new

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def whole_tokenizer(texts: Sequence[str], opening: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer to which each of ``texts`` is one token; equal ones are the same.

    Args:
        texts: titles with their line breaks, and the pieces of prompts.
        opening: names of control tokens that stand before any text. They have the first ids.
    """
    names = [*(f"{CONTROL}{name}" for name in opening), *dict.fromkeys(texts)]
    vocabulary = {name: number for number, name in enumerate([*names, UNKNOWN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    control = [*names[: len(opening)], UNKNOWN]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in control])
    if opening:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*names[: len(opening)], "$A"],
            special_tokens=[(name, vocabulary[name]) for name in names[: len(opening)]],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        additional_special_tokens=names[: len(opening)],
        clean_up_tokenization_spaces=False,
    )


def make_whole(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Put a vocabulary of ``texts`` in place of the model's own; its tokenizer.

    Raises:
        UserError: the model's tokenizer makes something else of a text.
    """
    opening = opening_tokens(tokenizer)
    texts = list(dict.fromkeys(texts))
    pieces = [[token] for token in opening] + encode_texts(tokenizer, texts)
    means = [_means(table, pieces) for table in tables(model)]
    shape = model.config.get_text_config()
    # Of a token that pads, an embedding has no gradient; here every token is a text.
    shape.pad_token_id = shape.bos_token_id = shape.eos_token_id = None
    model.resize_token_embeddings(len(pieces), mean_resizing=False)
    model.get_input_embeddings().padding_idx = None
    with torch.no_grad():
        for table, mean in zip(tables(model), means, strict=True):
            table.copy_(mean)
    return whole_tokenizer(texts, tokenizer.convert_ids_to_tokens(opening))


def is_whole(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Is it one of :func:`whole_tokenizer`?"""
    return UNKNOWN in tokenizer.get_vocab()


def tables(model: PreTrainedModel) -> list[nn.Parameter]:
    """What has a row for each token: the embeddings, and the head's weights where they are not one
    with them."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = (weight for part in parts for weight in part.parameters(recurse=False))
    return list(dict.fromkeys(weights))


def table_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> list[str]:
    """The names that :func:`tables` have in ``state``, which holds the model's weights."""
    places = {own(table).data_ptr() for table in tables(model)}
    return [name for name, weight in state.items() if own(weight).data_ptr() in places]


def matched(
    saved: Tensor, into: Tensor, tokenizer: PreTrainedTokenizerBase, mine: PreTrainedTokenizerBase
) -> Tensor:
    """``into`` with the rows of ``saved`` whose texts are in both vocabularies.

    Args:
        saved: ``[saved tokens, …]``, by ``tokenizer``.
        into: ``[my tokens, …]``, by ``mine``.
    """
    theirs, ours = tokenizer.get_vocab(), mine.get_vocab()
    both = sorted((ours.keys() & theirs.keys()) - {UNKNOWN})
    merged = into.detach().clone()
    merged[[ours[text] for text in both]] = saved[[theirs[text] for text in both]].to(merged)
    return merged


def _means(table: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """The mean of some rows of ``table`` for each list of their numbers, ``[len(pieces), …]``."""
    lengths = torch.tensor([len(row) for row in pieces], device=table.device)
    rows = torch.tensor([*chain.from_iterable(pieces)], device=table.device)
    owner = torch.repeat_interleave(lengths)
    with torch.no_grad():
        sums = table.new_zeros(len(pieces), *table.shape[1:]).float()
        sums.index_add_(0, owner, table[rows].float())
        return (sums / lengths.view(-1, *[1] * (table.ndim - 1))).to(table)
