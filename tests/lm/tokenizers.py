"""Tokenizers of the kinds that backbones come with, built here."""

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CONTROL = "<|im_end|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789()<>|_:."


def byte_level(normalizer=None, dropout=None, after=None) -> PreTrainedTokenizerFast:
    """BPE over bytes, as GPT-2's; ``after`` is what stands behind a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(["alien (1979)\n", "the green ball\n"] * 3, trainer)
    made.model.dropout = dropout
    if normalizer:
        made.normalizer = normalizer
    if after:
        made.post_processor = processors.TemplateProcessing(
            f"<s> $A {after}", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def sentencepiece(normalizer=None) -> PreTrainedTokenizerFast:
    """Unigram with blanks as ▁, no bytes to fall back on."""
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("\n", -3.0),
        *((letter, -3.0) for letter in "▁" + LETTERS),
        ("▁alien", -2.0),
    ]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if normalizer:
        made.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bert() -> PreTrainedTokenizerFast:
    """WordPiece of lower case without accents."""
    tokens = ["[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "alien"]
    made = Tokenizer(
        models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    made.normalizer, made.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


KINDS = {
    "bytes": byte_level,
    "bytes, NFKC, lower case": lambda: byte_level(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "bytes, no accents": lambda: byte_level(
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "sentencepiece": sentencepiece,
    "sentencepiece, NFKC, lower case": lambda: sentencepiece(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "bert": bert,
}


def with_control(kind: str, **how: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with a control token that is looked for as ``how`` says (``normalized``,
    ``lstrip``, ``single_word``, …)."""
    made = KINDS[kind]()
    made.add_tokens([AddedToken(CONTROL, **how)])
    made.add_tokens([AddedToken("<|x|>", special=True, **how)], special_tokens=True)
    return made
