import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.scratch import build_model, train_tokenizer
from recbole_sdpo.lm.text import encode_texts, opening_tokens
from tests.lm.tokenizers import CONTROL, KINDS, bert, byte_level, sentencepiece, with_control


def encode_text(tokenizer, text):
    return encode_texts(tokenizer, [text])[0]


TITLES = ["Alien (1979)", "Amélie (2001)", "千と千尋 (2001)"]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(TITLES * 3, 300)
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_end|><|x|>"]})
    made.add_tokens(["<tool_call>"])
    return made


@pytest.mark.parametrize(
    "text",
    [
        "<|im_end|>",
        "a <|im_end|><|im_end|> b",
        "<s>",
        "<|im_end|><|x|>",
        "<tool_call>",
        "<<s>s>",
        "<|im_<s>end|>",
    ],
)
def test_no_text_becomes_a_control_token(tokenizer, text):
    ids = encode_text(tokenizer, text)
    assert not set(ids) & set(tokenizer.get_added_vocab().values())
    assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


HOSTILE = [
    CONTROL,
    "＜｜ｉｍ＿ｅｎｄ｜＞",
    "<|IM_END|>",
    "<|ím_énd|>",
    "<|im\u200b_end|>",
    CONTROL * 2,
    f"  {CONTROL} ",
    "<|x|>",
    "<s>",
]
HOW = st.fixed_dictionaries(
    {key: st.booleans() for key in ("normalized", "lstrip", "rstrip", "single_word")}
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    HOW,
    st.lists(st.sampled_from([*HOSTILE, "alien", "(", "<", "|>", " ", "é", "9"]), max_size=8),
)
def test_no_tokenizer_makes_a_control_token_of_a_text(kind, how, parts):
    """Whatever its normaliser does first; ids of titles that need no care are those that it
    always gives."""
    tokenizer, text = with_control(kind, **how), "".join(parts)
    control = {*tokenizer.get_added_vocab().values()}
    plain = tokenizer(text, add_special_tokens=False).input_ids
    try:
        ids = encode_text(tokenizer, text)
    except UserError as error:  # of a character that it does not know
        assert "control token '<unk>'" in str(error) or "control token '[UNK]'" in str(error)
        return
    assert not control & {*ids}
    assert ids == plain or control & {*plain}


@pytest.mark.parametrize("text", HOSTILE)
def test_what_normalises_to_a_control_token_is_cut_and_stays_whole(text):
    tokenizer = with_control("bytes, NFKC, lower case", normalized=True)
    ids = encode_text(tokenizer, text)
    assert not {*ids} & {*tokenizer.get_added_vocab().values()}
    assert tokenizer.decode(ids) == tokenizer.backend_tokenizer.normalizer.normalize_str(text)


def test_a_character_that_is_not_known_is_named():
    with pytest.raises(
        UserError,
        match=r"control token '<unk>' of '千' in 'alien 千'; choose a backbone whose tokenizer",
    ):
        encode_text(sentencepiece(), "alien 千")


def test_ordinary_text_is_tokenised_as_ever(tokenizer):
    assert (
        encode_text(tokenizer, "Alien (1979)")
        == tokenizer("Alien (1979)", add_special_tokens=False).input_ids
    )


def test_opening_is_what_the_tokenizer_puts_first(tokenizer):
    assert opening_tokens(tokenizer) == tokenizer("", add_special_tokens=True).input_ids
    assert opening_tokens(byte_level(after="</s>")) == [0]  # not </s>, which stands behind a text
    assert opening_tokens(bert()) == [1] and opening_tokens(sentencepiece()) == []


def test_frequent_titles_get_fewer_tokens():
    tokenizer = train_tokenizer(["the one everybody sees"] * 50 + ["another that few know"], 270)
    assert len(encode_text(tokenizer, "the one everybody sees")) < len(
        encode_text(tokenizer, "another that few know")
    )


def test_no_token_is_a_mere_step_to_another():
    """What no text is made of is not in the vocabulary, but for the bytes; every text is cut
    into the fewest pieces."""
    texts = ["red cube\n", "red ball\n", "blue cube\n"]
    tokenizer = train_tokenizer(texts * 9, 1000)
    pieces = set(tokenizer.get_vocab()) - {"<s>"}
    used = {piece for text in texts for piece in tokenizer.tokenize(text)}
    assert {piece for piece in pieces if len(piece) > 1} <= used and len(pieces) <= 256 + len(used)
    assert [len(encode_text(tokenizer, text)) for text in texts] == [1, 1, 1]
    assert len(encode_text(train_tokenizer(texts * 9, 257), texts[0])) == len(texts[0])


def test_scratch_weights_depend_on_their_seed_alone():
    import torch

    torch.manual_seed(1)
    first = build_model(64, 16, 1, 2, 0.0, seed=5)
    here = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == here  # building drew nothing from the global generator
    second = build_model(64, 16, 1, 2, 0.0, seed=5)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_others_are_tokens_where_all_texts_are_and_cost_these_nothing():
    texts, others = ["red cube\n", "blue ball\n"] * 9, [f"other {n}\n" for n in range(500)]
    without = train_tokenizer(texts, 1000)
    for size, few in ((1000, 3), (1000, 500), (300, 500)):
        made = train_tokenizer(texts, size, others[:few])
        own = [len(encode_text(made, other)) for other in others[:few]]
        assert own.count(1) == min(few, size - len(without), len(without))
        assert len(made) == len(without) + own.count(1)
        for text in {*texts}:
            assert [*encode_text(made, text)] == [*encode_text(without, text)]
    spelled = train_tokenizer(texts, 260, others)
    assert len(encode_text(spelled, others[0])) > 1 < len(encode_text(spelled, texts[0]))
